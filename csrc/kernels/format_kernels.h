// The products with any format, written once; included by each matmul_<family>.isa.cpp inside its anonymous namespace,
// after the vocabulary and the formats.

// clang-format off: each uses constants of those before
#include "kernels/weight_stream.h"
#include "kernels/quantized_traits.h"
#include "kernels/direct_matmul.h"
#include "kernels/expanded_matmul.h"
#include "kernels/quantized_matmul.h"
#include "kernels/float_matmul.h"
#ifdef MOESAIC_HAS_TILES
#include "kernels/tile_matmul_bf16.h"
#endif
// clang-format on

template <class F>
void weights_as_floats(const uint8_t* panel, int64_t first_col, int num_cols, float* out) {
    if constexpr (F::kQuantized) {
        dequantize_cols<F>(panel, first_col, num_cols, out);
    } else {
        convert_cols<F>(panel, first_col, num_cols, out);
    }
}

// sums[k][0..15] += weights[k][0..15] * x
void add_products(const float* weights, int num_cols, vf x, float* sums) {
    for (int k = 0; k < 16 * num_cols; k += 16) store(sums + k, fma(load(weights + k), x, load(sums + k)));
}

template <class F>
void transposed(const uint8_t* panels, int64_t panel_bytes, int64_t num_panels, int64_t first_col, int num_cols,
                const float* const* tokens, int num_tokens, float* const* out) {
    alignas(64) float weights[16 * kTransposedCols];
    alignas(64) float sums[kMaxTransposedTokens][16 * kTransposedCols];
    for (int t = 0; t < num_tokens; ++t) {
        for (int k = 0; k < 16 * num_cols; k += 16) store(sums[t] + k, set1(0.0f));
    }
    for (int64_t p = 0; p < num_panels; ++p, panels += panel_bytes) {
        weights_as_floats<F>(panels, first_col, num_cols, weights);
        for (int t = 0; t < num_tokens; ++t) {
            add_products(weights, num_cols, load(tokens[t] + 16 * p), sums[t]);
        }
    }
    for (int t = 0; t < num_tokens; ++t) {
        for (int k = 0; k < num_cols; ++k) out[t][k] = reduce_add(load(sums[t] + 16 * k));
    }
}

template <class F>
void transpose_panel(const uint8_t* panel, int64_t first_col, int num_cols, float* out, int64_t stride) {
    alignas(64) float weights[16 * kTransposedCols];
    weights_as_floats<F>(panel, first_col, num_cols, weights);
    for (int k = 0; k < num_cols; k += 16, out += stride) {
        vf block[16];
        for (int i = 0; i < 16; ++i) block[i] = load(weights + 16 * (k + i));
        transpose(block);
        for (int r = 0; r < 16; ++r) store(out + 16 * r, block[r]);
    }
}

#ifdef MOESAIC_HAS_TILES
// From how many tokens on tiles are faster than dot products of integers, or than float32. For integers: at 16 tokens
// 1.1 to 1.6 x, and products by tiles take as long for fewer.
template <class F>
constexpr int64_t kTilesFrom = F::kQuantized ? 14 : 8;
#endif

template <class F>
constexpr MatmulKernels kernels_of() {
    MatmulKernels kernels{};
    kernels.transposed = transposed<F>;
    kernels.transpose = transpose_panel<F>;
    if constexpr (F::kQuantized) {
        kernels.matmul = quantized_matmul<F>;
    } else {
        kernels.matmul = float_matmul<F>;
    }
#ifdef MOESAIC_HAS_TILES
    if constexpr (F::kBlock > 1) {
        kernels.matmul_bf16 = expanded_matmul_bf16<F>;
    } else if constexpr (F::kGgmlType == BF16::kGgmlType) {
        kernels.matmul_bf16 = bf16_matmul_bf16<F>;
        kernels.wants_lower = true;
    }
    kernels.bf16_from = kTilesFrom<F>;
#endif
    return kernels;
}
