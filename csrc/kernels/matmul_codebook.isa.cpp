#define MOESAIC_FAMILY codebook
#define MOESAIC_FOR_EACH_FORMAT_OF_FAMILY MOESAIC_FOR_EACH_CODEBOOK_FORMAT
#include "kernels/matmul_family.h"
