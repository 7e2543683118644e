// The small steps between matrix products: one pass over rows of floats each.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

enum class RowOp : int32_t {
    kSiluMul = 0,      // out = silu(x) * y
    kGeluMul = 1,      // out = gelu(x) * y, with the error function
    kGeluTanhMul = 2,  // out = gelu(x) * y, with tanh
    kSigmoidMul = 3,   // out = sigmoid(x) * y
    kAddScaled = 4,    // out = x + scale * y
    kAddGated = 5,     // out = x + sigmoid(gate of the row) * y
};

// Rows of `width` floats; strides in floats; out may be x or y.
struct RowOpArgs {
    RowOp op;
    const float* x;
    int64_t x_stride;
    const float* y;
    int64_t y_stride;
    float* out;
    int64_t out_stride;
    const float* gate;  // [rows], kAddGated
    float scale;        // kAddScaled
    int64_t num_rows, width;
};

struct ElementwiseKernels {
    void (*row_op)(const RowOpArgs& a, int64_t row_begin, int64_t row_end);
    // Index of the largest of n >= 1 values; the first of equal ones; a NaN counts as the largest.
    int64_t (*argmax)(const float* x, int64_t n);
};
MOESAIC_DECLARE_KERNELS(ElementwiseKernels, elementwise_kernels)

void row_op(const RowOpArgs& a);

// indices[i] = argmax of row i.
void argmax(const float* x, int64_t stride, int64_t num_rows, int64_t width, int64_t* indices);

}  // namespace moesaic
