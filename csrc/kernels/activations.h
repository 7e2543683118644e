// Activations as the kernels of quantised weights take them, and the functions between gate/up and down.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

constexpr int kActivationGroup = 32;

// 32 consecutive activations: x = scale * values, values in [-127, 127]; one cache line. The sums pay for the zero
// point (integers) and the offset (floats) of a weight format whose scales belong to 32 or to 16 weights.
struct alignas(64) ActivationGroup {
    std::int8_t values[32];
    float scale;
    std::int32_t negated_sum;
    std::int32_t negated_half_sums[2];
    float scaled_sum;  // scale * sum of values
    float scaled_half_sums[2];
};
static_assert(sizeof(ActivationGroup) == 64);

enum class ActivationKind : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSwigluOai };

// What experts do between up and down: f(gate) * up, or f(up) without a gate. kSwigluOai is gpt-oss's
// min(gate, limit) * sigmoid(alpha * gate) * (clamp(up, -limit, limit) + 1).
struct Activation {
    ActivationKind kind;
    float alpha;
    float limit;
};

struct ActivationKernels {
    // num_groups groups of 32 floats at x.
    void (*quantize)(const float* x, std::int64_t num_groups, ActivationGroup* out);
    // 32 num_steps floats in bfloat16: to nearest, and what is left of them unless lower is null. Each 32 of them go
    // step_stride values further. Null where no kernel wants them.
    void (*to_bf16)(const float* x, std::int64_t num_steps, std::int64_t step_stride, std::uint16_t* upper,
                    std::uint16_t* lower);
    // out[i] = f(gate[i]) * up[i], or f(up[i]) if gate is null, for a multiple of 16 floats.
    void (*activate)(const Activation& activation, const float* gate, const float* up, std::int64_t count, float* out);
    // sums[i] += factor * x[i] for a multiple of 16 floats.
    void (*add_scaled)(const float* x, float factor, std::int64_t count, float* sums);
};
MOESAIC_DECLARE_KERNELS(ActivationKernels, activation_kernels)

}  // namespace moesaic
