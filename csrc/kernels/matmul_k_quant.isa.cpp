#define MOESAIC_FAMILY k_quant
#define MOESAIC_FOR_EACH_FORMAT_OF_FAMILY MOESAIC_FOR_EACH_K_QUANT_FORMAT
#include "kernels/matmul_family.h"
