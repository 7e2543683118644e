// What happens to the heads of queries and keys before attention: normalisation and rotary positions, in place.
//
// Rotary embedding: Su et al., arXiv 2104.09864. A pair (a, b) at frequency i becomes (a cos - b sin, b cos + a sin).
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "ops/attention.h"

namespace moesaic {

// Where the pairs of a head lie before and after the rotation; `half` is the number of pairs.
enum class RopeLayout : int32_t {
    kHalf = 0,               // (i, i + half): Llama as in Hugging Face, Qwen, GLM-4.5, gpt-oss
    kInterleaved = 1,        // (2i, 2i + 1): DeepSeek-V2, Ernie
    kInterleavedToHalf = 2,  // read as (2i, 2i + 1), written as (i, i + half): DeepSeek-V3 in Hugging Face
};

enum class HeadNorm : int32_t {
    kNone = 0,
    kPerHead = 1,           // each head over head_dim, before the rotation: Qwen3, GLM-4.5
    kPerHeadAfterRope = 2,  // the same after it: Hunyuan
    kAllHeads = 3,  // one norm over all heads of a token, before it; weight [heads * head_dim]: MiniMax-M2, OLMoE
};

constexpr int64_t kMaxRotaryPairs = 512;

// The heads of one tensor [batch, heads, tokens, head_dim], any strides, last dimension contiguous.
struct Heads {
    float* data;
    Strides3 stride;
    int64_t num_heads, head_dim;
    const float* norm_weight;
};

struct RotaryArgs {
    Heads q, k;  // num_heads 0: absent
    int64_t batch, num_tokens;
    const float* cos;  // [batch, tokens, pairs] by strides
    const float* sin;
    int64_t angle_batch_stride, angle_token_stride, angle_stride;
    int64_t num_pairs;  // 0: no rotation
    RopeLayout layout;
    HeadNorm norm;
    float eps, weight_offset;
};

struct RotaryKernels {
    void (*token)(const RotaryArgs& a, int64_t batch, int64_t token);
};
MOESAIC_DECLARE_KERNELS(RotaryKernels, rotary_kernels)

void norm_and_rotate(const RotaryArgs& a);

}  // namespace moesaic
