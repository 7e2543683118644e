#include "block_steps.h"

namespace moesaic {

namespace {

void append_both(const AttentionBlock& b, const AttentionBlockCall& c, const float* k, const float* v) {
    append(c, k, b.k.rows, b.num_kv_heads, b.head_dim, c.cache.keys, c.cache.key_stride);
    append(c, v, b.v.rows, b.num_kv_heads, b.head_dim, c.cache.values, c.cache.value_stride);
}

}  // namespace

void append_keys(const AttentionBlock& b, const AttentionBlockCall& c) {
    const std::int64_t num_tokens = c.batch * c.num_tokens, hidden = b.q.cols;
    Buffers buffers(num_tokens * (hidden + b.k.rows + b.v.rows) + 3 * 16);
    float* normed = buffers.take(padded(num_tokens * hidden));
    float* k = buffers.take(padded(num_tokens * b.k.rows));
    float* v = buffers.take(padded(num_tokens * b.v.rows));
    normalize(b.norm, c.x, hidden, num_tokens, hidden, normed);
    const LinearJob inputs[] = {job_of(b.k, k), job_of(b.v, v)};
    linear(inputs, {normed, hidden}, num_tokens);
    norm_and_rotate(heads_of(b, c, {nullptr, 0}, {k, b.num_kv_heads}));
    append_both(b, c, k, v);
}

void attention_block(const AttentionBlock& b, const AttentionBlockCall& c) {
    const std::int64_t num_tokens = c.batch * c.num_tokens, hidden = b.q.cols;
    Buffers buffers(num_tokens * (hidden + b.o.rows + 2 * b.q.rows + b.k.rows + b.v.rows) + 6 * 16);
    float* normed = buffers.take(padded(num_tokens * hidden));
    float* q = buffers.take(padded(num_tokens * b.q.rows));
    float* k = buffers.take(padded(num_tokens * b.k.rows));
    float* v = buffers.take(padded(num_tokens * b.v.rows));
    float* attended = buffers.take(padded(num_tokens * b.q.rows));
    float* output = buffers.take(padded(num_tokens * b.o.rows));

    normalize(b.norm, c.x, hidden, num_tokens, hidden, normed);
    const LinearJob inputs[] = {job_of(b.q, q), job_of(b.k, k), job_of(b.v, v)};
    linear(inputs, {normed, hidden}, num_tokens);
    norm_and_rotate(heads_of(b, c, {q, b.num_heads}, {k, b.num_kv_heads}));
    append_both(b, c, k, v);
    attention(attention_of(b, c, q, attended));
    const LinearJob last = job_of(b.o, output);
    linear({&last, 1}, {attended, b.o.cols}, num_tokens);
    add_scaled(c.x, output, b.residual_scale, num_tokens, hidden, c.out);
}

}  // namespace moesaic
