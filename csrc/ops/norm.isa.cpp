#include "ops/norm.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

MOESAIC_INLINE int lanes(int64_t left) { return left < 16 ? static_cast<int>(left) : 16; }

// The row to normalise: x itself, or the residual after x was added to it.
const float* source_row(const NormArgs& a, int64_t row) {
    const float* x = a.x + row * a.x_stride;
    if (a.residual == nullptr) return x;
    float* residual = a.residual + row * a.residual_stride;
    const vf scale = set1(a.residual_scale);
    for (int64_t i = 0; i < a.width; i += 16) {
        const int n = lanes(a.width - i);
        store_n(residual + i, fma(scale, load_n(x + i, n), load_n(residual + i, n)), n);
    }
    return residual;
}

float sum_of_row(const float* x, int64_t width) {
    vf sum = set1(0.0f);
    for (int64_t i = 0; i < width; i += 16) sum = add(sum, load_n(x + i, lanes(width - i)));
    return reduce_add(sum);
}

float sum_of_squares(const float* x, int64_t width, float mean) {
    vf even = set1(0.0f), odd = set1(0.0f);
    const vf m = set1(mean);
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) {
        const vf x0 = sub(load(x + i), m), x1 = sub(load(x + i + 16), m);
        even = fma(x0, x0, even);
        odd = fma(x1, x1, odd);
    }
    float tail = 0.0f;
    for (; i < width; ++i) tail += (x[i] - mean) * (x[i] - mean);
    return reduce_add(add(even, odd)) + tail;
}

// out = (x - mean) * factor * (weight + offset) + bias
void write_row(const NormArgs& a, const float* x, float mean, float factor, float* out) {
    const vf m = set1(mean), f = set1(factor), offset = set1(a.weight_offset);
    for (int64_t i = 0; i < a.width; i += 16) {
        const int n = lanes(a.width - i);
        vf y = mul(sub(load_n(x + i, n), m), f);
        if (a.weight != nullptr) y = mul(y, add(load_n(a.weight + i, n), offset));
        if (a.bias != nullptr) y = add(y, load_n(a.bias + i, n));
        store_n(out + i, y, n);
    }
}

void rms_rows(const NormArgs& a, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float* x = source_row(a, row);
        const float mean_square = sum_of_squares(x, a.width, 0.0f) / static_cast<float>(a.width);
        write_row(a, x, 0.0f, 1.0f / __builtin_sqrtf(mean_square + a.eps), a.out + row * a.out_stride);
    }
}

void layer_rows(const NormArgs& a, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float* x = source_row(a, row);
        const float mean = sum_of_row(x, a.width) / static_cast<float>(a.width);
        const float variance = sum_of_squares(x, a.width, mean) / static_cast<float>(a.width);
        write_row(a, x, mean, 1.0f / __builtin_sqrtf(variance + a.eps), a.out + row * a.out_stride);
    }
}

}  // namespace

const NormKernels& norm_kernels() {
    static constexpr NormKernels kernels{rms_rows, layer_rows};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
