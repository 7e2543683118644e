#define MOESAIC_FAMILY float
#define MOESAIC_FOR_EACH_FORMAT_OF_FAMILY MOESAIC_FOR_EACH_FLOAT_FORMAT
#include "kernels/matmul_family.h"
