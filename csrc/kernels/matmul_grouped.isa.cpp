#define MOESAIC_FAMILY grouped
#define MOESAIC_FOR_EACH_FORMAT_OF_FAMILY MOESAIC_FOR_EACH_GROUPED_FORMAT
#include "kernels/matmul_family.h"
