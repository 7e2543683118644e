#include "block_steps.h"

namespace moesaic {

namespace {

void norm_and_rotate_heads(const AttentionBlock& b, const AttentionBlockCall& c, float* q, float* k) {
    RotaryArgs a = rotary_of(c, b.rope_layout, b.num_pairs);
    a.q = {q, projected(c, b.num_heads, b.head_dim), b.num_heads, b.head_dim, b.q_norm.weight};
    a.k = {k, projected(c, b.num_kv_heads, b.head_dim), b.num_kv_heads, b.head_dim, b.k_norm.weight};
    a.norm = b.head_norm;
    a.eps = b.q_norm.eps;
    norm_and_rotate(a);
}

void attend(const AttentionBlock& b, const AttentionBlockCall& c, const float* q, float* out) {
    AttentionArgs a = attention_of(c, b.scale);
    const Strides3 rows = projected(c, b.num_heads, b.head_dim);
    a.parts[0] = {q, rows, c.cache.keys, c.cache.key_stride, b.head_dim};
    a.num_parts = 1;
    a.v = c.cache.values;
    a.v_stride = c.cache.value_stride;
    a.value_dim = b.head_dim;
    a.out = out;
    a.out_stride = rows;
    a.num_kv_heads = b.num_kv_heads;
    a.group = b.num_heads / b.num_kv_heads;
    a.sinks = b.sinks;
    attention(a);
}

}  // namespace

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
    norm_and_rotate_heads(b, c, q, k);
    append(c, k, b.k.rows, b.num_kv_heads, b.head_dim, c.cache.keys, c.cache.key_stride);
    append(c, v, b.v.rows, b.num_kv_heads, b.head_dim, c.cache.values, c.cache.value_stride);
    attend(b, c, q, attended);
    const LinearJob last = job_of(b.o, output);
    linear({&last, 1}, {attended, b.o.cols}, num_tokens);
    add_scaled(c.x, output, b.residual_scale, num_tokens, hidden, c.out);
}

}  // namespace moesaic
