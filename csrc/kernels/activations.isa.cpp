#include "kernels/activations.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

void quantize(const float* x, int64_t num_groups, ActivationGroup* out) {
    for (int64_t g = 0; g < num_groups; ++g, x += 32) {
        const vf a = load(x), b = load(x + 16);
        const float largest = reduce_max(max(abs(a), abs(b)));
        // A subnormal maximum would make the inverse infinite; such a group is zero for every purpose.
        const vf inverse = set1(largest > 1e-36f ? 127.0f / largest : 0.0f);
        const vi qa = to_int(mul(a, inverse)), qb = to_int(mul(b, inverse));
        ActivationGroup& group = out[g];
        store_as_i8(group.values, qa);
        store_as_i8(group.values + 16, qb);
        const int32_t sum_a = reduce_add(qa), sum_b = reduce_add(qb);
        group.scale = largest / 127.0f;
        group.negated_sum = -(sum_a + sum_b);
        group.negated_half_sums[0] = -sum_a;
        group.negated_half_sums[1] = -sum_b;
        group.scaled_sum = group.scale * static_cast<float>(sum_a + sum_b);
        group.scaled_half_sums[0] = group.scale * static_cast<float>(sum_a);
        group.scaled_half_sums[1] = group.scale * static_cast<float>(sum_b);
    }
}

#ifdef MOESAIC_HAS_TILES
void to_bf16(const float* x, int64_t num_steps, int64_t step_stride, uint16_t* upper, uint16_t* lower) {
    for (int64_t s = 0; s < num_steps; ++s, x += 32) {
        uint16_t* to = upper + s * step_stride;
        for (int i = 0; i < 32; i += 16) {
            const vf value = load(x + i);
            store_as_bf16(to + i, value);
            if (lower != nullptr) store_as_bf16(lower + s * step_stride + i, sub(value, load_bf16(to + i)));
        }
    }
}
#else
constexpr decltype(ActivationKernels::to_bf16) to_bf16 = nullptr;
#endif

vf relu(vf x) { return max(x, set1(0.0f)); }

vf relu2(vf x) {
    const vf positive = relu(x);
    return mul(positive, positive);
}

template <vf (*kFunction)(vf)>
void activate_with(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
        store(out + i, gate != nullptr ? mul(kFunction(load(gate + i)), load(up + i)) : kFunction(load(up + i)));
    }
}

void swiglu_oai(const Activation& activation, const float* gate, const float* up, int64_t count, float* out) {
    const vf limit = set1(activation.limit), negated_limit = set1(-activation.limit), alpha = set1(activation.alpha);
    for (int64_t i = 0; i < count; i += 16) {
        const vf g = min(load(gate + i), limit);
        const vf u = max(min(load(up + i), limit), negated_limit);
        store(out + i, mul(mul(g, sigmoid(mul(g, alpha))), add(u, set1(1.0f))));
    }
}

void activate(const Activation& activation, const float* gate, const float* up, int64_t count, float* out) {
    switch (activation.kind) {
        case ActivationKind::kSilu:
            return activate_with<silu>(gate, up, count, out);
        case ActivationKind::kGelu:
            return activate_with<gelu_erf>(gate, up, count, out);
        case ActivationKind::kGeluTanh:
            return activate_with<gelu_tanh>(gate, up, count, out);
        case ActivationKind::kRelu:
            return activate_with<relu>(gate, up, count, out);
        case ActivationKind::kRelu2:
            return activate_with<relu2>(gate, up, count, out);
        case ActivationKind::kSwigluOai:
            return swiglu_oai(activation, gate, up, count, out);
    }
}

void add_scaled(const float* x, float factor, int64_t count, float* sums) {
    for (int64_t i = 0; i < count; i += 16) store(sums + i, fma(load(x + i), set1(factor), load(sums + i)));
}

}  // namespace

const ActivationKernels& activation_kernels() {
    static constexpr ActivationKernels kernels{quantize, to_bf16, activate, add_scaled};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
