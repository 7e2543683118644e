#include <algorithm>
#include <vector>

#include "block_steps.h"
#include "expanded_latents.h"

namespace moesaic {

namespace {

// Tokens of a paged call whose queries are multiplied by k_b together: on a latent of 512 numbers per head they are
// several times as wide as everything else, gigabytes for the tokens of a long prompt.
constexpr std::int64_t kTokensPerPart = 256;

std::int64_t query_width(const LatentAttentionBlock& b) { return b.num_heads * (b.nope_dim + b.rope_dim); }

// q [tokens, heads * (nope + rope)] and compressed [tokens, latent + rope] from the normalised input.
void project(const LatentAttentionBlock& b, const float* normed, std::int64_t num_tokens, Buffers& buffers, float* q,
             float* compressed) {
    const bool low_rank = b.q_a.format != nullptr;
    float* first = low_rank ? buffers.take(padded(num_tokens * b.q_a.rows)) : q;
    const LinearJob jobs[] = {job_of(low_rank ? b.q_a : b.q_b, first), job_of(b.kv_a, compressed)};
    linear(jobs, {normed, b.kv_a.cols}, num_tokens);
    if (!low_rank) return;
    float* rank = buffers.take(padded(num_tokens * b.q_a.rows));
    normalize(b.q_a_norm, first, b.q_a.rows, num_tokens, b.q_a.rows, rank);
    const LinearJob second = job_of(b.q_b, q);
    linear({&second, 1}, {rank, b.q_b.cols}, num_tokens);
}

// Of queries (null: there are none) and keys.
void rotate(const LatentAttentionBlock& b, const AttentionBlockCall& c, float* q, float* compressed) {
    const std::int64_t head = b.nope_dim + b.rope_dim, row = b.latent_dim + b.rope_dim;
    RotaryArgs a = rotary_of(c, b.rope_layout, b.rope_dim / 2);
    if (q != nullptr) a.q = {q + b.nope_dim, projected(c, b.num_heads, head), b.num_heads, b.rope_dim, nullptr};
    a.k = {compressed + b.latent_dim, projected(c, 1, row), 1, b.rope_dim, nullptr};
    norm_and_rotate(a);
}

// Latents and rotated keys of compressed [tokens, latent + rope], by way of latent [tokens, latent].
void append_compressed(const LatentAttentionBlock& b, const AttentionBlockCall& c, const float* compressed,
                       float* latent) {
    const std::int64_t num_tokens = c.batch * c.num_tokens, row = b.latent_dim + b.rope_dim;
    normalize(b.kv_a_norm, compressed, row, num_tokens, b.latent_dim, latent);
    append(c, latent, b.latent_dim, 1, b.latent_dim, c.cache.keys, c.cache.key_stride);
    append(c, compressed + b.latent_dim, row, 1, b.rope_dim, c.cache.values, c.cache.value_stride);
}

// mixed [tokens, heads, latent] = softmax over the cache of latents.
void attend(const LatentAttentionBlock& b, const AttentionBlockCall& c, const float* q, const float* q_latent,
            float* mixed) {
    AttentionArgs a = attention_of(c, b.scale);
    const Strides3 latents = projected(c, b.num_heads, b.latent_dim);
    const Strides3 heads = projected(c, b.num_heads, b.nope_dim + b.rope_dim);
    a.parts[0] = {q_latent, latents, c.cache.keys, c.cache.key_stride, b.latent_dim};
    a.parts[1] = {q + b.nope_dim, heads, c.cache.values, c.cache.value_stride, b.rope_dim};
    a.num_parts = 2;
    a.v = c.cache.keys;
    a.v_stride = c.cache.key_stride;
    a.value_dim = b.latent_dim;
    a.out = mixed;
    a.out_stride = latents;
    a.num_kv_heads = 1;
    a.group = b.num_heads;
    attention(a);
}

// Tokens [begin, end) of a paged call as a call of their own, which does not see the keys of later ones.
class CallPart {
  public:
    CallPart(const AttentionBlockCall& c, std::int64_t begin, std::int64_t end) : call_(c), step_(*c.paged) {
        const KeyPages& pages = step_.pages;
        for (std::int64_t s = 0; s <= step_.num_sequences; ++s) {
            starts_.push_back(static_cast<std::int32_t>(std::clamp<std::int64_t>(pages.starts[s], begin, end) - begin));
        }
        for (std::int64_t s = 0; s < step_.num_sequences; ++s) {
            const std::int64_t later = pages.starts[s + 1] - std::max<std::int64_t>(pages.starts[s], end);
            const std::int64_t hidden = std::clamp<std::int64_t>(later, 0, pages.num_keys[s]);
            num_keys_.push_back(static_cast<std::int32_t>(pages.num_keys[s] - hidden));
        }
        step_.pages.starts = starts_.data();
        step_.pages.num_keys = num_keys_.data();
        call_.num_tokens = end - begin;
        call_.paged = &step_;
    }
    CallPart(const CallPart&) = delete;
    CallPart& operator=(const CallPart&) = delete;
    const AttentionBlockCall& call() const { return call_; }

  private:
    AttentionBlockCall call_;
    PagedStep step_;
    std::vector<std::int32_t> starts_, num_keys_;
};

// attended [tokens, heads * value] of queries q; q_latent and mixed have room for all tokens of the call.
void attend_absorbed(const LatentAttentionBlock& b, const AttentionBlockCall& c, const float* q, float* q_latent,
                     float* mixed, float* attended) {
    const std::int64_t head = b.nope_dim + b.rope_dim;
    const std::int64_t latents = b.num_heads * b.latent_dim, values = b.num_heads * b.value_dim;
    const std::int64_t num_tokens = c.batch * c.num_tokens;
    const auto absorb = b.k_b_transposed ? linear_transposed_heads : linear_heads;
    absorb(b.k_b, {q, b.num_heads * head, head}, {q_latent, latents, b.latent_dim}, num_tokens);
    attend(b, c, q, q_latent, mixed);
    linear_heads(b.v_b, {mixed, latents, b.latent_dim}, {attended, values, b.value_dim}, num_tokens);
}

struct TokenSpan {
    std::int64_t begin, end;
};

// The sequences of a paged call whose keys and values are expanded, and the spans of tokens of all others; without
// pages there is one span.
struct Forms {
    std::vector<std::int64_t> expanded;
    std::vector<TokenSpan> absorbed;
    std::int64_t longest_part = 0;  // of the tokens that are multiplied by k_b together

    Forms(const LatentAttentionBlock& b, const AttentionBlockCall& c) {
        const std::int64_t num_tokens = c.batch * c.num_tokens;
        std::int64_t begin = 0;
        for (std::int64_t s = 0; c.paged != nullptr && s < c.paged->num_sequences; ++s) {
            const KeyPages& pages = c.paged->pages;
            if (!expanding_pays(b, c, pages.starts[s + 1] - pages.starts[s], pages.num_keys[s])) continue;
            expanded.push_back(s);
            add({begin, pages.starts[s]}, kTokensPerPart);
            begin = pages.starts[s + 1];
        }
        add({begin, num_tokens}, c.paged == nullptr ? num_tokens : kTokensPerPart);
    }

  private:
    void add(TokenSpan span, std::int64_t most) {
        for (std::int64_t end; span.begin < span.end; span.begin = end) {
            end = std::min(span.begin + most, span.end);
            absorbed.push_back({span.begin, end});
            longest_part = std::max(longest_part, end - span.begin);
        }
    }
};

}  // namespace

void append_latents(const LatentAttentionBlock& b, const AttentionBlockCall& c) {
    const std::int64_t num_tokens = c.batch * c.num_tokens, hidden = b.kv_a.cols, row = b.latent_dim + b.rope_dim;
    Buffers buffers(num_tokens * (hidden + row + b.latent_dim) + 3 * 16);
    float* normed = buffers.take(padded(num_tokens * hidden));
    float* compressed = buffers.take(padded(num_tokens * row));
    float* latent = buffers.take(padded(num_tokens * b.latent_dim));
    normalize(b.norm, c.x, hidden, num_tokens, hidden, normed);
    const LinearJob job = job_of(b.kv_a, compressed);
    linear({&job, 1}, {normed, hidden}, num_tokens);
    rotate(b, c, nullptr, compressed);
    append_compressed(b, c, compressed, latent);
}

void latent_attention_block(const LatentAttentionBlock& b, const AttentionBlockCall& c) {
    const std::int64_t num_tokens = c.batch * c.num_tokens, hidden = b.kv_a.cols, row = b.latent_dim + b.rope_dim;
    const std::int64_t values = b.num_heads * b.value_dim;
    const Forms forms(b, c);
    const std::int64_t latents = forms.longest_part * b.num_heads * b.latent_dim;
    Buffers buffers(num_tokens * (2 * hidden + query_width(b) + row + b.latent_dim + values + 2 * b.q_a.rows) +
                    2 * latents + 10 * 16);
    float* normed = buffers.take(padded(num_tokens * hidden));
    float* q = buffers.take(padded(num_tokens * query_width(b)));
    float* compressed = buffers.take(padded(num_tokens * row));
    float* latent = buffers.take(padded(num_tokens * b.latent_dim));
    float* q_latent = buffers.take(padded(latents));
    float* mixed = buffers.take(padded(latents));
    float* attended = buffers.take(padded(num_tokens * values));
    float* output = buffers.take(padded(num_tokens * hidden));

    normalize(b.norm, c.x, hidden, num_tokens, hidden, normed);
    project(b, normed, num_tokens, buffers, q, compressed);
    rotate(b, c, q, compressed);
    append_compressed(b, c, compressed, latent);

    for (const std::int64_t sequence : forms.expanded) attend_expanded(b, c, sequence, q, attended);
    for (const auto& [begin, end] : forms.absorbed) {
        if (end - begin == num_tokens) {
            attend_absorbed(b, c, q, q_latent, mixed, attended);
        } else {
            const CallPart some(c, begin, end);
            attend_absorbed(b, some.call(), q + begin * query_width(b), q_latent, mixed, attended + begin * values);
        }
    }
    const LinearJob last = job_of(b.o, output);
    linear({&last, 1}, {attended, values}, num_tokens);
    add_scaled(c.x, output, b.residual_scale, num_tokens, hidden, c.out);
}

}  // namespace moesaic
