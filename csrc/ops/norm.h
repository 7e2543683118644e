// Root-mean-square and layer normalisation of rows (Zhang and Sennrich, arXiv 1910.07467; Ba et al., arXiv 1607.06450).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

// out = norm(source) * (weight + weight_offset) [+ bias], where source is x, or, with a residual,
// residual = residual + residual_scale * x, which is written back. Rows are contiguous; strides are in floats.
struct NormArgs {
    const float* x;
    int64_t x_stride;
    float* residual;  // null: none
    int64_t residual_stride;
    float residual_scale;
    const float* weight;  // null: all ones
    const float* bias;    // layer norm only; null: none
    float weight_offset;
    float eps;
    float* out;
    int64_t out_stride;
    int64_t num_rows, width;
};

struct NormKernels {
    void (*rms_rows)(const NormArgs& a, int64_t row_begin, int64_t row_end);
    void (*layer_rows)(const NormArgs& a, int64_t row_begin, int64_t row_end);
};
MOESAIC_DECLARE_KERNELS(NormKernels, norm_kernels)

void rms_norm(const NormArgs& a);
void layer_norm(const NormArgs& a);

}  // namespace moesaic
