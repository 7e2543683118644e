// Linear attention by the gated delta rule (arXiv 2412.06464) for tokens of several sequences, whose states lie in
// slots: everything between the projections of a layer and its output matrix. float32.
//
// Queries, keys and values are SiLU of a short causal convolution of some projected columns; queries and keys are
// divided by their lengths. Per head and token, with a state S [key_dim, value_dim]:
//     S *= decay;  S += k (beta (v - k S))^T;  out = q S;  out = norm(out) * SiLU(gate)
// Tokens go one after the other, so that a token's numbers do not depend on how many come with it.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

constexpr int64_t kDeltaLanes = 16;       // channels of a block of the convolution
constexpr int64_t kDeltaColumns = 32;     // of a state that are worked on at a time
constexpr int64_t kMaxDeltaKeyDim = 256;  // so many rows of them stay in the first-level cache
constexpr int64_t kMaxDeltaTaps = 16;

struct DeltaNetArgs {
    // where the tokens are
    int64_t num_tokens, num_sequences;
    const int32_t* starts;     // [num_sequences + 1]
    const int64_t* slots;      // [num_sequences], different ones
    const int64_t* positions;  // [num_tokens]; a sequence whose first token here is at 0 begins with zeros
    // projections of the tokens, and which columns are what
    const float* x;
    int64_t x_stride;
    const int32_t* conv_columns;   // [channels]: queries, keys, values by heads
    const int32_t* gate_columns;   // [heads], the first of value_dim
    const int32_t* beta_columns;   // [heads], before the sigmoid
    const int32_t* decay_columns;  // [heads]: decay = exp(-rate softplus(x + step_bias))
    int64_t key_heads, heads, key_dim, value_dim;
    const float* conv_weight;  // [taps][channels], the last tap is the token's own
    int64_t taps;
    const float* rate;         // [heads]
    const float* step_bias;    // [heads]
    const float* norm_weight;  // [value_dim]
    float norm_eps;
    float* conv_state;  // [slots][taps - 1][channels], oldest first
    float* state;       // [slots][heads][key_dim][value_dim]
    float* mixed;       // [num_tokens][channels], memory to work in
    float* gates;       // [num_tokens][2][heads], the same: decay, beta
    float* out;         // [num_tokens][heads * value_dim]

    int64_t channels() const { return 2 * key_heads * key_dim + heads * value_dim; }
    bool is_new(int64_t sequence) const { return positions[starts[sequence]] == 0; }
};

struct DeltaNetKernels {
    // mixed of a sequence's channels from channel on, at most kDeltaLanes of them, and the state of the convolution
    void (*convolve)(const DeltaNetArgs& a, int64_t sequence, int64_t channel);
    // queries and keys in mixed become what the rule takes
    void (*normalize)(const DeltaNetArgs& a, int64_t token_begin, int64_t token_end);
    // out and the state of a sequence's head, at most kDeltaColumns columns from column on
    void (*recur)(const DeltaNetArgs& a, int64_t sequence, int64_t head, int64_t column);
    // norm and gate of out
    void (*finish)(const DeltaNetArgs& a, int64_t token_begin, int64_t token_end);
};
MOESAIC_DECLARE_KERNELS(DeltaNetKernels, delta_net_kernels)

// Throws std::invalid_argument if starts do not divide the tokens, or a slot is not one of num_slots.
void check_delta_net(const DeltaNetArgs& a, int64_t num_slots);

void delta_net(const DeltaNetArgs& a);

}  // namespace moesaic
