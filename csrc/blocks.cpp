#include "blocks.h"

#include <bit>
#include <cstring>

#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/rows.h"
#include "quantize/half.h"

namespace moesaic {

namespace {

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

LinearJob job_of(const PackedMatrix& m, float* out) {
    return {m.format, m.rows, m.cols, m.weights, 0, m.rows, m.bias, out, m.rows, 0};
}

void normalize(const NormWeight& norm, const float* x, std::int64_t num_tokens, std::int64_t width, float* out) {
    NormArgs a{};
    a.x = x;
    a.x_stride = width;
    a.weight = norm.weight;
    a.eps = norm.eps;
    a.out = out;
    a.out_stride = width;
    a.num_rows = num_tokens;
    a.width = width;
    rms_norm(a);
}

// out = x + scale * y, contiguous rows.
void add_scaled(const float* x, const float* y, float scale, std::int64_t num_rows, std::int64_t width, float* out) {
    RowOpArgs a{};
    a.op = RowOp::kAddScaled;
    a.x = x;
    a.y = y;
    a.out = out;
    a.x_stride = a.y_stride = a.out_stride = width;
    a.scale = scale;
    a.num_rows = num_rows;
    a.width = width;
    row_op(a);
}

std::uint16_t bf16_from_float(float v) {
    const auto bits = std::bit_cast<std::uint32_t>(v);
    if (v != v) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void convert(const float* from, std::int64_t n, CacheType type, void* to, std::int64_t offset) {
    auto* halves = static_cast<std::uint16_t*>(to) + offset;
    switch (type) {
        case CacheType::kF32:
            std::memcpy(static_cast<float*>(to) + offset, from, static_cast<std::size_t>(n) * sizeof(float));
            break;
        case CacheType::kBF16:
            for (std::int64_t i = 0; i < n; ++i) halves[i] = bf16_from_float(from[i]);
            break;
        case CacheType::kF16:
            for (std::int64_t i = 0; i < n; ++i) halves[i] = quantize::half_from_float(from[i]);
            break;
    }
}

// from: [batch * num_tokens, heads * dim].
void append(const AttentionBlock& b, const AttentionBlockCall& c, const float* from, void* to, const Strides3& s) {
    const std::int64_t width = b.num_kv_heads * b.head_dim;
    for_rows(c.batch * c.num_tokens, width, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t token = c.cache.num_past + i % c.num_tokens;
            const std::int64_t offset = i / c.num_tokens * s.batch + token * s.token;
            for (std::int64_t h = 0; h < b.num_kv_heads; ++h) {
                convert(from + i * width + h * b.head_dim, b.head_dim, c.cache.type, to, offset + h * s.head);
            }
        }
    });
}

// Strides of [batch * num_tokens, heads * dim] seen as [batch, heads, tokens, dim].
Strides3 projected(const AttentionBlockCall& c, std::int64_t heads, std::int64_t dim) {
    return {c.num_tokens * heads * dim, dim, heads * dim};
}

void norm_and_rotate_heads(const AttentionBlock& b, const AttentionBlockCall& c, float* q, float* k) {
    RotaryArgs a{};
    a.q = {q, projected(c, b.num_heads, b.head_dim), b.num_heads, b.head_dim, b.q_norm.weight};
    a.k = {k, projected(c, b.num_kv_heads, b.head_dim), b.num_kv_heads, b.head_dim, b.k_norm.weight};
    a.batch = c.batch;
    a.num_tokens = c.num_tokens;
    a.cos = c.cos;
    a.sin = c.sin;
    a.angle_batch_stride = c.angle_stride.batch;
    a.angle_token_stride = c.angle_stride.head;
    a.angle_stride = c.angle_stride.token;
    a.num_pairs = b.num_pairs;
    a.layout = b.rope_layout;
    a.norm = b.head_norm;
    a.eps = b.q_norm.eps;
    norm_and_rotate(a);
}

void attend(const AttentionBlock& b, const AttentionBlockCall& c, const float* q, float* out) {
    AttentionArgs a{};
    const Strides3 rows = projected(c, b.num_heads, b.head_dim);
    a.parts[0] = {q, rows, c.cache.keys, c.cache.key_stride, b.head_dim};
    a.num_parts = 1;
    a.cache_type = c.cache.type;
    a.v = c.cache.values;
    a.v_stride = c.cache.value_stride;
    a.value_dim = b.head_dim;
    a.out = out;
    a.out_stride = rows;
    a.batch = c.batch;
    a.num_kv_heads = b.num_kv_heads;
    a.group = b.num_heads / b.num_kv_heads;
    a.num_queries = c.num_tokens;
    a.num_keys = c.cache.num_past + c.num_tokens;
    a.scale = b.scale;
    a.causal_offset = c.mask_type == MaskType::kNone ? &c.cache.num_past : nullptr;
    a.sinks = b.sinks;
    a.mask_type = c.mask_type;
    a.mask = c.mask;
    a.mask_stride = c.mask_stride;
    attention(a);
}

// Routing of one call, and the shared experts' trivial one: expert 0 for every token.
struct Choice {
    std::int64_t* experts;
    float* weights;
};

void choose(const FeedForwardBlock& b, const float* normed, std::int64_t num_tokens, float* logits, Choice choice) {
    const LinearJob job = job_of(b.router, logits);
    linear({&job, 1}, {normed, b.router.cols}, num_tokens);
    RouteArgs a = b.routing;
    a.logits = logits;
    a.logits_stride = b.router.rows;
    a.num_tokens = num_tokens;
    a.num_experts = b.router.rows;
    a.indices = choice.experts;
    a.weights = choice.weights;
    route(a);
}

void choose_first(std::int64_t num_tokens, Choice choice) {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        choice.experts[t] = 0;
        choice.weights[t] = 1.0f;
    }
}

// out += shared experts(normed), gated if there is a gate.
void add_shared(const FeedForwardBlock& b, const float* normed, std::int64_t num_tokens, float* out) {
    const std::int64_t width = b.experts->hidden;
    AlignedArray<std::int64_t> zeros(static_cast<std::size_t>(num_tokens));
    AlignedArray<float> floats(static_cast<std::size_t>(num_tokens * (width + 2)));
    float* shared = floats.data();
    float* ones = shared + num_tokens * width;
    float* gates = ones + num_tokens;
    choose_first(num_tokens, {zeros.data(), ones});
    moe_forward(*b.shared, {zeros.data(), ones, 1}, normed, width, num_tokens, shared);
    RowOpArgs a{};
    a.op = RowOp::kAddScaled;
    a.scale = 1.0f;
    if (b.shared_gate.format != nullptr) {
        const LinearJob job = job_of(b.shared_gate, gates);
        linear({&job, 1}, {normed, width}, num_tokens);
        a.op = RowOp::kAddGated;
        a.gate = gates;
    }
    a.x = out;
    a.y = shared;
    a.out = out;
    a.x_stride = a.y_stride = a.out_stride = width;
    a.num_rows = num_tokens;
    a.width = width;
    row_op(a);
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

    normalize(b.norm, c.x, num_tokens, hidden, normed);
    const LinearJob inputs[] = {job_of(b.q, q), job_of(b.k, k), job_of(b.v, v)};
    linear(inputs, {normed, hidden}, num_tokens);
    norm_and_rotate_heads(b, c, q, k);
    append(b, c, k, c.cache.keys, c.cache.key_stride);
    append(b, c, v, c.cache.values, c.cache.value_stride);
    attend(b, c, q, attended);
    const LinearJob last = job_of(b.o, output);
    linear({&last, 1}, {attended, b.o.cols}, num_tokens);
    add_scaled(c.x, output, b.residual_scale, num_tokens, hidden, c.out);
}

void feed_forward_block(const FeedForwardBlock& b, float* x, std::int64_t num_tokens) {
    const std::int64_t width = b.experts->hidden;
    const std::int64_t top_k = b.router.format == nullptr ? 1 : b.routing.top_k;
    Buffers buffers(num_tokens * (2 * width + top_k + b.router.rows) + 4 * 16);
    float* normed = buffers.take(padded(num_tokens * width));
    float* out = buffers.take(padded(num_tokens * width));
    float* weights = buffers.take(padded(num_tokens * top_k));
    float* logits = buffers.take(padded(num_tokens * b.router.rows));
    thread_local AlignedArray<std::int64_t> indices;
    const Choice choice{indices.reserve(static_cast<std::size_t>(num_tokens * top_k)), weights};

    normalize(b.norm, x, num_tokens, width, normed);
    if (b.router.format == nullptr) {
        choose_first(num_tokens, choice);
    } else {
        choose(b, normed, num_tokens, logits, choice);
    }
    moe_forward(*b.experts, {choice.experts, choice.weights, top_k}, normed, width, num_tokens, out);
    if (b.shared != nullptr) add_shared(b, normed, num_tokens, out);
    add_scaled(x, out, b.residual_scale, num_tokens, width, x);
}

}  // namespace moesaic
