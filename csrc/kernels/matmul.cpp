#include "kernels/matmul.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(MatmulTable, matmul_table)

}  // namespace moesaic
