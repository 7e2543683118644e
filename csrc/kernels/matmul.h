// Products with packed weights: the one place where weight bits meet activations.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

constexpr int kMaxPanels = 2;                   // panels of 16 rows that one call takes
constexpr int kOutputStride = 16 * kMaxPanels;  // floats between the tokens of its output
constexpr int kMaxTilePairs = 4;                // pairs of panels that one call by tiles takes
constexpr int kMaxTransposedTokens = 4;
constexpr int kTransposedCols = 256;

constexpr std::int64_t kTokenPadding = 16;  // up to which kernels round the number of tokens

// Floats that the output of num_tokens tokens takes.
constexpr std::size_t output_size(std::int64_t num_tokens) {
    return static_cast<std::size_t>((num_tokens + kTokenPadding - 1) / kTokenPadding * kTokenPadding * kOutputStride);
}

// Rows of activations in bfloat16, as tiles [16 rows][32 values] that a processor's tile unit loads whole: x = upper +
// lower, or only its upper half where lower is null. Rows begin with a tile; the last may be partly filled.
struct Bf16Tokens {
    const std::uint16_t *upper, *lower;
};
constexpr std::int64_t kBf16Step = 32;  // values of a row that lie together

// Where 32 values of a row are, in values from the first tile on.
constexpr std::int64_t bf16_offset(std::int64_t row, std::int64_t step, std::int64_t cols) {
    return ((row / kTokenPadding * (cols / kBf16Step) + step) * kTokenPadding + row % kTokenPadding) * kBf16Step;
}
constexpr std::int64_t padded_tokens(std::int64_t num_tokens) {
    return (num_tokens + kTokenPadding - 1) / kTokenPadding * kTokenPadding;
}

struct MatmulKernels {
    // out[t][16 p + r] = row r of panel p times token t. A token is `cols` floats for a float format, `cols / 32`
    // ActivationGroups for a quantised one. Panels lie one after the other from `panels` on; weights are read once
    // whatever num_tokens. `next` is where the caller will read afterwards, fetched ahead of time.
    void (*matmul)(const std::uint8_t* panels, int num_panels, std::int64_t cols, const void* const* tokens,
                   std::int64_t num_tokens, float* out, const std::uint8_t* next);

    // The same from bfloat16 activations, with weights rounded to bfloat16 if they have more bits; `cols` is a multiple
    // of 32. If wants_lower, the lower parts of activations are wanted too. Up to 2 kMaxTilePairs panels: out has
    // output_size(num_tokens) floats for each pair of them, of which those beyond the tokens become undefined. Null
    // where there is none, else the faster one from bf16_from tokens on.
    void (*matmul_bf16)(const std::uint8_t* panels, int num_panels, std::int64_t cols, const Bf16Tokens& tokens,
                        std::int64_t num_tokens, float* out, const std::uint8_t* next);
    std::int64_t bf16_from;
    bool wants_lower;

    // out[t][k] = sum over rows r of tokens[t][r] * W[r][first_col + k] for the rows of num_panels panels that lie
    // panel_bytes apart, k < num_cols <= kTransposedCols and num_tokens <= kMaxTransposedTokens. first_col and num_cols
    // are multiples of the block and of 2 (num_cols may be odd at the end).
    void (*transposed)(const std::uint8_t* panels, std::int64_t panel_bytes, std::int64_t num_rows,
                       std::int64_t first_col, int num_cols, const float* const* tokens, int num_tokens,
                       float* const* out);

    // The transpose of 16 rows, as panels of F32: columns [first_col + 16 p, ...) are floats at out + p * stride, the
    // 16 of each row side by side. num_cols <= kTransposedCols is a multiple of 16 and, as first_col, of the block.
    void (*transpose)(const std::uint8_t* panel, std::int64_t first_col, int num_cols, float* out, std::int64_t stride);
};

// Does a product of these sizes want bfloat16 activations?
inline bool wants_bf16(const MatmulKernels& kernels, std::int64_t cols, std::int64_t num_tokens) {
    return kernels.matmul_bf16 != nullptr && num_tokens >= kernels.bf16_from && cols % 32 == 0;
}

// The kernels of a family of formats, in the order of formats.h.
struct MatmulFamily {
    const MatmulKernels* kernels;
    int num_formats;
};

#define MOESAIC_DECLARE_FAMILIES(isa)           \
    namespace isa_##isa {                       \
        const MatmulFamily& float_kernels();    \
        const MatmulFamily& block32_kernels();  \
        const MatmulFamily& k_quant_kernels();  \
        const MatmulFamily& codebook_kernels(); \
        const MatmulFamily& grouped_kernels();  \
    }
MOESAIC_FOR_EACH_ISA(MOESAIC_DECLARE_FAMILIES)

// The kernels of each format, in the order of formats.h.
struct MatmulTable {
    const MatmulKernels* formats;
};
const MatmulTable& matmul_table();

}  // namespace moesaic
