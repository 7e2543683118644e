#include "kernels/activations.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

void quantize(const float* x, int64_t num_groups, QuantizedActivations out) {
    for (int64_t g = 0; g < num_groups; ++g, x += 32) {
        const vf a = load(x), b = load(x + 16);
        const float largest = reduce_max(max(abs(a), abs(b)));
        const vf inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
        const vi qa = to_int(mul(a, inverse)), qb = to_int(mul(b, inverse));
        store_as_i8(out.values + 32 * g, qa);
        store_as_i8(out.values + 32 * g + 16, qb);
        out.scales[g] = largest / 127.0f;
        out.negated_sums[2 * g] = -reduce_add(qa);
        out.negated_sums[2 * g + 1] = -reduce_add(qb);
    }
}

}  // namespace

const ActivationKernels& activation_kernels() {
    static constexpr ActivationKernels kernels{quantize};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
