// The whole of a unit matmul_<family>.isa.cpp, which says before which family it is: the products with its formats, for
// one instruction set.
#include "kernels/matmul.h"

#include MOESAIC_ISA_HEADER

#include "formats/formats.h"
#include "kernels/activations.h"

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

#include "kernels/format_kernels.h"

// A null row at the end: a family may be empty.
#define X(F) kernels_of<F>(),
constexpr MatmulKernels kFormatKernels[] = {MOESAIC_FOR_EACH_FORMAT_OF_FAMILY(X) MatmulKernels{}};
#undef X

}  // namespace

const MatmulFamily& MOESAIC_CONCAT(MOESAIC_FAMILY, _kernels)() {
    static constexpr MatmulFamily family{kFormatKernels, sizeof(kFormatKernels) / sizeof(kFormatKernels[0]) - 1};
    return family;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
