// The routed experts of one layer: gate, up, activation, down and the weighted sum in one call.
//
// Knows no instruction set and no model. The work is cut by (expert, 32 rows): first all rows of gate and up, which end
// as quantised pieces of the down projection's input, then, after the only barrier, the rows of the output, each of
// which one thread sums over all experts. Tokens that chose the same expert share each read of its weights.
//
// On several memory nodes every expert is cut along its intermediate dimension: a slice has rows of gate and up and the
// columns of down that belong to them, on one node, whose threads compute its part of the output. Whoever completes the
// last part of some rows adds the parts up, always in the same order.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "formats/registry.h"
#include "kernels/activations.h"

namespace moesaic {

// A stack of equal packed matrices, one per expert.
struct ExpertMatrices {
    const FormatInfo* format;  // null: there is no such projection
    const std::uint8_t* weights;
    std::int64_t matrix_bytes;  // between experts
    const float* bias;          // of the first row of the first expert; null: none
    std::int64_t bias_stride;   // between experts
};

// Some intermediate rows of all experts.
struct ExpertSlice {
    ExpertMatrices gate, up, down;  // gate and up [intermediate, hidden], down [hidden, intermediate]
    std::int64_t intermediate;      // of the slice
};

struct Experts {
    std::vector<ExpertSlice>
        slices;  // slice s lies on node s; formats are the same in all, biases of down in the first
    std::int64_t num_experts, hidden;
    Activation activation;
};

struct Routing {
    const std::int64_t* experts;  // [num_tokens, top_k]; an id outside [0, num_experts) stands for no expert
    const float* weights;         // [num_tokens, top_k]
    std::int64_t top_k;
};

// Throws std::invalid_argument for shapes that the formats cannot have.
void check_experts(const Experts& experts);

// What one thread of the pool does first, while the others begin with the experts.
using Beside = std::function<void()>;

// out[num_tokens, hidden] = sum over the chosen experts of weight * expert(x); rows of x are x_stride floats
// apart; out must not overlap x. `beside` runs once, in the calling thread; null: nothing. `ready`: experts that were
// read ahead (moe_ahead.h), which come first; the result is the same.
void moe_forward(const Experts& experts, const Routing& routing, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out, const Beside* beside = nullptr,
                 std::span<const std::int64_t> ready = {});

}  // namespace moesaic
