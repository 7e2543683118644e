#include "kernels/activations.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(ActivationKernels, activation_kernels)

}  // namespace moesaic
