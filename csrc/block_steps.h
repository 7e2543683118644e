// Steps that the blocks of blocks.h share: small wrappers of kernels/ and ops/ for contiguous rows.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

namespace moesaic {

// Buffers of one call. Those of a decode step are cut from memory that the thread keeps, so that a step allocates
// nothing; those of a long prompt are given back.
class Buffers {
  public:
    explicit Buffers(std::int64_t floats) {
        thread_local AlignedArray<float> kept;
        next_ = (floats <= kKeptFloats ? kept : own_).reserve(static_cast<std::size_t>(floats));
    }
    float* take(std::int64_t floats) {
        float* taken = next_;
        next_ += floats;
        return taken;
    }

  private:
    static constexpr std::int64_t kKeptFloats = 1 << 20;
    AlignedArray<float> own_;
    float* next_;
};

// The product with a whole matrix; out is contiguous.
LinearJob job_of(const PackedMatrix& m, float* out);

// out = rms_norm(x); rows of x are x_stride floats apart, out is contiguous.
void normalize(const NormWeight& norm, const float* x, std::int64_t x_stride, std::int64_t num_rows, std::int64_t width,
               float* out);

// out = x + scale * y, contiguous rows.
void add_scaled(const float* x, const float* y, float scale, std::int64_t num_rows, std::int64_t width, float* out);

// Strides of [batch * num_tokens, heads * dim] seen as [batch, heads, tokens, dim].
Strides3 projected(const AttentionBlockCall& c, std::int64_t heads, std::int64_t dim);

// Writes new rows [batch * num_tokens, heads * dim], row_stride floats apart, into one tensor of the call's cache, in
// its type, behind the tokens that are there.
void append(const AttentionBlockCall& c, const float* from, std::int64_t row_stride, std::int64_t heads,
            std::int64_t dim, void* to, const Strides3& s);

// The same for one head of the call's first token.
void append_head(const AttentionBlockCall& c, const float* from, std::int64_t head, std::int64_t dim, void* to,
                 const Strides3& s);

// What the call says about rotary angles, mask and causality.
RotaryArgs rotary_of(const AttentionBlockCall& c, RopeLayout layout, std::int64_t num_pairs);
AttentionArgs attention_of(const AttentionBlockCall& c, float scale);

// Heads of a grouped-query block that lie side by side.
struct SomeHeads {
    float* data;
    std::int64_t count;
};
// Their norms and rotation, and the attention of all heads.
RotaryArgs heads_of(const AttentionBlock& b, const AttentionBlockCall& c, SomeHeads q, SomeHeads k);
AttentionArgs attention_of(const AttentionBlock& b, const AttentionBlockCall& c, const float* q, float* out);

}  // namespace moesaic
