// Some rows of an expert's matrix times its tokens. Knows no routing.
#pragma once

#include <cstdint>

#include "kernels/matmul.h"
#include "moe.h"
#include "moe_tokens.h"

namespace moesaic {

constexpr std::int64_t kPanel = 16;  // rows of an item of down, which threads take in pairs

// Up to kMaxTilePairs pairs of panels of a matrix, rows of it from a panel's first on.
struct Rows {
    std::int64_t first, count, cols;
    std::int64_t num_panels() const { return (count + kPanel - 1) / kPanel; }
    std::int64_t num_pairs() const { return (count + kPair - 1) / kPair; }
};

// Pairs of panels of gate and up in each slice.
inline std::vector<std::int64_t> pairs_of_slices(const Experts& experts) {
    std::vector<std::int64_t> pairs;
    for (const ExpertSlice& slice : experts.slices) pairs.push_back((slice.intermediate + kPair - 1) / kPair);
    return pairs;
}

// Floats that a pair of panels of an expert's output takes.
inline std::int64_t pair_size(std::int64_t num_tokens) { return static_cast<std::int64_t>(output_size(num_tokens)); }

// out[pair][t][0..31] = those rows of an expert's matrix times the tokens, plus the bias, pairs being pair_size()
// apart. `next`: what this thread will probably read afterwards.
void multiply_rows(const ExpertMatrices& m, const MatmulKernels& kernels, const Rows& rows, std::int64_t expert,
                   const ExpertTokens& tokens, float* out, const std::uint8_t* next);

}  // namespace moesaic
