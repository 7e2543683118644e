// The two halves of a pre-norm decoder layer, each as one call: attention block (grouped-query or latent) and
// feed-forward block.
//
// They put together what kernels/ and ops/ compute and add no arithmetic of their own; what they save is the way back
// to the caller between the steps. They know pointers and shapes, no model. All activations are float32.
#pragma once

#include <cstdint>

#include "formats/registry.h"
#include "kernels/linear.h"
#include "moe.h"
#include "ops/attention.h"
#include "ops/rotary.h"
#include "ops/route.h"

namespace moesaic {

// A packed matrix and its bias (null: none). format null: there is no such matrix.
struct PackedMatrix {
    const FormatInfo* format;
    const std::uint8_t* weights;
    std::int64_t rows, cols;
    const float* bias;
};

struct NormWeight {
    const float* weight;
    float eps;
};

// out = x + residual_scale * o(attention(rotated heads of q, k, v(norm(x)))) for grouped-query attention.
struct AttentionBlock {
    NormWeight norm;
    PackedMatrix q, k, v, o;
    std::int64_t num_heads, num_kv_heads, head_dim;
    HeadNorm head_norm;
    NormWeight q_norm, k_norm;
    RopeLayout rope_layout;
    std::int64_t num_pairs;
    float scale;
    const float* sinks;
    float residual_scale;
};

// The same for multi-head latent attention on the latent cache, with kv_b absorbed (arXiv 2405.04434): the cache's keys
// are latents, its values rotated keys, of one head each.
struct LatentAttentionBlock {
    NormWeight norm;
    PackedMatrix q_a;  // format null: queries are projected by q_b alone
    NormWeight q_a_norm;
    PackedMatrix q_b, kv_a, o;
    NormWeight kv_a_norm;
    HeadMatrices k_b, v_b;  // per head: [nope, latent] if k_b_transposed, else [latent, nope]; and [value, latent]
    bool k_b_transposed;
    std::int64_t num_heads, nope_dim, rope_dim, latent_dim, value_dim;
    RopeLayout rope_layout;
    float scale;
    float residual_scale;
};

// Room for keys and values [batch, num_kv_heads, capacity, head_dim] by strides, of which the first num_past tokens are
// there; the call appends its own behind them. With pages [blocks, block_size, num_kv_heads, head_dim], where batch is
// the stride of a block, and num_past is not used.
struct KeyValueCache {
    void* keys;
    Strides3 key_stride;
    void* values;
    Strides3 value_stride;
    CacheType type;
    std::int64_t num_past;
    std::int64_t window;  // with pages: only so many of the last keys are seen; 0: all
};

// Where the tokens of several sequences are, and where they go, for all layers.
struct PagedStep {
    KeyPages pages;
    std::int64_t num_sequences;
    const std::int64_t* slots;  // [tokens] block * block_size + offset for new keys; negative: nowhere
};

struct AttentionBlockCall {
    const float* x;  // [batch * num_tokens, hidden], contiguous
    std::int64_t batch, num_tokens;
    const float* cos;  // [batch, num_tokens, num_pairs] by strides
    const float* sin;
    Strides3 angle_stride;  // batch, token, pair
    KeyValueCache cache;
    const PagedStep* paged;  // null: one cache row per batch row; otherwise batch is 1, and num_tokens that of all
    MaskType mask_type;      // none: causal; with pages nothing else
    const void* mask;        // [batch, heads, num_tokens, num_past + num_tokens] by strides
    Strides3 mask_stride;
    float* out;  // [batch * num_tokens, hidden], contiguous; may be x
};

void attention_block(const AttentionBlock& block, const AttentionBlockCall& call);
void latent_attention_block(const LatentAttentionBlock& block, const AttentionBlockCall& call);
// Of the same calls, only what they leave in the cache; call.out is not used.
void append_keys(const AttentionBlock& block, const AttentionBlockCall& call);
void append_latents(const LatentAttentionBlock& block, const AttentionBlockCall& call);

// x += residual_scale * (experts(norm(x)) + shared experts(norm(x)) [* sigmoid(gate)]).
struct FeedForwardBlock {
    NormWeight norm;
    PackedMatrix router;  // format null: one expert that all tokens choose with weight 1, which is a dense MLP
    RouteArgs routing;    // all but what depends on the tokens
    const Experts* experts;
    const Experts* shared;  // null: none
    PackedMatrix shared_gate;
    float residual_scale;
};

// x: [num_tokens, hidden], contiguous.
void feed_forward_block(const FeedForwardBlock& block, float* x, std::int64_t num_tokens);

}  // namespace moesaic
