// Activations as the quantised kernels take them: int8 in groups of 32 with a float scale.
//
// A row of K floats becomes K int8 values in [-127, 127], one scale per 32 values (x = scale * q) and the negated sum
// of q over each 16 values, which pays for a weight format's zero point and minima.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

constexpr int kActivationGroup = 32;

// Pointers into one quantised row, or into the first of several.
struct QuantizedActivations {
    std::int8_t* values;         // [K]
    float* scales;               // [K / 32]
    std::int32_t* negated_sums;  // [K / 16]
};

struct ActivationKernels {
    // num_groups groups of 32 floats at x.
    void (*quantize)(const float* x, std::int64_t num_groups, QuantizedActivations out);
};
MOESAIC_DECLARE_KERNELS(ActivationKernels, activation_kernels)

}  // namespace moesaic
