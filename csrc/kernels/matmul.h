// Products with packed weights: the one place where weight bits meet activations.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

constexpr int kMaxPanels = 2;                   // panels of 16 rows that one call takes
constexpr int kOutputStride = 16 * kMaxPanels;  // floats between the tokens of its output
constexpr int kMaxTransposedTokens = 4;
constexpr int kTransposedCols = 256;

struct MatmulKernels {
    // out[t][16 p + r] = row r of panel p times token t. A token is `cols` floats for a float format, `cols / 32`
    // ActivationGroups for a quantised one. Panels lie one after the other from `panels` on; weights are read once
    // whatever num_tokens. `next` is where the caller will read afterwards, fetched ahead of time.
    void (*matmul)(const std::uint8_t* panels, int num_panels, std::int64_t cols, const void* const* tokens,
                   std::int64_t num_tokens, float* out, const std::uint8_t* next);

    // out[t][k] = sum over rows r of tokens[t][r] * W[r][first_col + k] for the rows of num_panels panels that lie
    // panel_bytes apart, k < num_cols <= kTransposedCols and num_tokens <= kMaxTransposedTokens. first_col and num_cols
    // are multiples of the block and of 2 (num_cols may be odd at the end).
    void (*transposed)(const std::uint8_t* panels, std::int64_t panel_bytes, std::int64_t num_rows,
                       std::int64_t first_col, int num_cols, const float* const* tokens, int num_tokens,
                       float* const* out);
};

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
