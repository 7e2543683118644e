#define MOESAIC_FAMILY block32
#define MOESAIC_FOR_EACH_FORMAT_OF_FAMILY MOESAIC_FOR_EACH_BLOCK32_FORMAT
#include "kernels/matmul_family.h"
