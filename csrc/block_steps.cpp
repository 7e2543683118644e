#include "block_steps.h"

#include <bit>
#include <cstring>

#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/rows.h"
#include "quantize/half.h"

namespace moesaic {

namespace {

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

// Where the keys of token i of a call go in a tensor of its cache; negative: nowhere.
std::int64_t append_offset(const AttentionBlockCall& c, std::int64_t i, const Strides3& s) {
    if (c.paged == nullptr) return i / c.num_tokens * s.batch + (c.cache.num_past + i % c.num_tokens) * s.token;
    const std::int64_t slot = c.paged->slots[i], size = c.paged->pages.block_size;
    return slot < 0 ? -1 : slot / size * s.batch + slot % size * s.token;
}

}  // namespace

LinearJob job_of(const PackedMatrix& m, float* out) {
    return {m.format, m.rows, m.cols, m.weights, 0, m.rows, m.bias, out, m.rows, 0};
}

void normalize(const NormWeight& norm, const float* x, std::int64_t x_stride, std::int64_t num_rows, std::int64_t width,
               float* out) {
    NormArgs a{};
    a.x = x;
    a.x_stride = x_stride;
    a.weight = norm.weight;
    a.eps = norm.eps;
    a.out = out;
    a.out_stride = width;
    a.num_rows = num_rows;
    a.width = width;
    rms_norm(a);
}

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

Strides3 projected(const AttentionBlockCall& c, std::int64_t heads, std::int64_t dim) {
    return {c.num_tokens * heads * dim, dim, heads * dim};
}

void append(const AttentionBlockCall& c, const float* from, std::int64_t row_stride, std::int64_t heads,
            std::int64_t dim, void* to, const Strides3& s) {
    for_rows(c.batch * c.num_tokens, 4 * heads * dim, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t offset = append_offset(c, i, s);
            for (std::int64_t h = 0; h < heads && offset >= 0; ++h) {
                convert(from + i * row_stride + h * dim, dim, c.cache.type, to, offset + h * s.head);
            }
        }
    });
}

void append_head(const AttentionBlockCall& c, const float* from, std::int64_t head, std::int64_t dim, void* to,
                 const Strides3& s) {
    const std::int64_t offset = append_offset(c, 0, s);
    if (offset >= 0) convert(from, dim, c.cache.type, to, offset + head * s.head);
}

RotaryArgs rotary_of(const AttentionBlockCall& c, RopeLayout layout, std::int64_t num_pairs) {
    RotaryArgs a{};
    a.batch = c.batch;
    a.num_tokens = c.num_tokens;
    a.cos = c.cos;
    a.sin = c.sin;
    a.angle_batch_stride = c.angle_stride.batch;
    a.angle_token_stride = c.angle_stride.head;
    a.angle_stride = c.angle_stride.token;
    a.num_pairs = num_pairs;
    a.layout = layout;
    return a;
}

AttentionArgs attention_of(const AttentionBlockCall& c, float scale) {
    AttentionArgs a{};
    a.cache_type = c.cache.type;
    a.batch = c.batch;
    a.num_queries = c.num_tokens;
    a.num_keys = c.cache.num_past + c.num_tokens;
    a.scale = scale;
    a.causal_offset = c.mask_type == MaskType::kNone ? &c.cache.num_past : nullptr;
    a.mask_type = c.mask_type;
    a.mask = c.mask;
    a.mask_stride = c.mask_stride;
    if (c.paged != nullptr) {
        a.pages = &c.paged->pages;
        a.batch = c.paged->num_sequences;
        a.sliding_window = c.cache.window;
    }
    return a;
}

RotaryArgs heads_of(const AttentionBlock& b, const AttentionBlockCall& c, SomeHeads q, SomeHeads k) {
    RotaryArgs a = rotary_of(c, b.rope_layout, b.num_pairs);
    a.q = {q.data, projected(c, q.count, b.head_dim), q.count, b.head_dim, b.q_norm.weight};
    a.k = {k.data, projected(c, k.count, b.head_dim), k.count, b.head_dim, b.k_norm.weight};
    a.norm = b.head_norm;
    a.eps = b.q_norm.eps;
    return a;
}

AttentionArgs attention_of(const AttentionBlock& b, const AttentionBlockCall& c, const float* q, float* out) {
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
    return a;
}

}  // namespace moesaic
