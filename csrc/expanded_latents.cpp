#include "expanded_latents.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "block_steps.h"
#include "kernels/independent_rows.h"
#include "ops/rows.h"
#include "quantize/half.h"

namespace moesaic {

namespace {

constexpr std::int64_t kQueriesFrom = 32;                     // fewer are not worth the way
constexpr std::int64_t kMostFloats = std::int64_t{4} << 20u;  // of keys and values that are there at once

// What products cost relative to each other: those of attention, of packed matrices, and of matrices that have to be
// transposed, which is done in float32.
struct Prices {
    std::int64_t attention, matrix, transposed;
};
constexpr Prices kPrices{3, 1, 3}, kPricesByTiles{1, 1, 6};

// Attention with a head of keys for each head of queries, as far as the call tells.
AttentionArgs attention_of_heads(const LatentAttentionBlock& b, const AttentionBlockCall& c) {
    AttentionArgs a = attention_of(c, b.scale);
    a.group = 1;
    return a;
}

float as_float(std::uint16_t bits, CacheType type) {
    if (type == CacheType::kF16) return quantize::float_from_half(bits);
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16u);
}

// Keys [0, num_keys) of a sequence of one tensor of the cache, which has one head, as floats [num_keys, dim].
void read_cache(const AttentionArgs& a, std::int64_t sequence, const void* data, const Strides3& s, std::int64_t dim,
                std::int64_t num_keys, float* out) {
    for_rows(num_keys, dim, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t key = begin; key < end; ++key) {
            const std::int64_t offset = key_offset(a, s, sequence, key);
            float* to = out + key * dim;
            if (a.cache_type == CacheType::kF32) {
                std::copy_n(static_cast<const float*>(data) + offset, dim, to);
            } else {
                const std::uint16_t* from = static_cast<const std::uint16_t*>(data) + offset;
                for (std::int64_t i = 0; i < dim; ++i) to[i] = as_float(from[i], a.cache_type);
            }
        }
    });
}

// The same numbers in bfloat16, as products by tiles take them, or as they are.
class Operand {
  public:
    Operand(const float* values, std::int64_t count, bool as_bf16) : data_(values) {
        if (!as_bf16) return;
        halves_.reserve(static_cast<std::size_t>(count));
        std::uint16_t* to = halves_.data();
        for_rows(count / 16, 16, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = 16 * begin; i < 16 * end; ++i) {
                const auto bits = std::bit_cast<std::uint32_t>(values[i]);
                to[i] = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u);
            }
        });
        for (std::int64_t i = count / 16 * 16; i < count; ++i) {
            to[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(values[i]) >> 16u);
        }
        data_ = to;
    }
    const void* data() const { return data_; }

  private:
    const void* data_;
    AlignedArray<std::uint16_t> halves_;
};

// Some heads of a matrix per head.
HeadMatrices heads_from(const HeadMatrices& all, std::int64_t first, std::int64_t count) {
    HeadMatrices some = all;
    some.weights += first * all.matrix_bytes;
    some.first_row += first * all.row_step;
    some.num_heads = count;
    return some;
}

// The rows of all these heads times the same input.
void add_jobs(const HeadMatrices& w, float* out, std::vector<LinearJob>& jobs) {
    for (std::int64_t h = 0; h < w.num_heads; ++h) {
        jobs.push_back({w.format, w.rows, w.cols, w.weights + h * w.matrix_bytes, w.first_row + h * w.row_step,
                        w.num_rows, nullptr, out + h * w.num_rows, w.num_heads * w.num_rows, 0});
    }
}

// One sequence on its way: latents and rotated keys as floats, and the queries' part of the arguments.
class Expanded {
  public:
    Expanded(const LatentAttentionBlock& b, const AttentionBlockCall& c, std::int64_t sequence)
        : b_(b),
          first_query_(c.paged->pages.starts[sequence]),
          num_queries_(c.paged->pages.starts[sequence + 1] - first_query_),
          num_keys_(c.paged->pages.num_keys[sequence]),
          num_past_(num_keys_ - num_queries_),
          args_(attention_of_heads(b, c)),
          latents_(static_cast<std::size_t>(num_keys_ * b.latent_dim)),
          rope_(static_cast<std::size_t>(num_keys_ * b.rope_dim)) {
        read_cache(args_, sequence, c.cache.keys, c.cache.key_stride, b.latent_dim, num_keys_, latents_.data());
        read_cache(args_, sequence, c.cache.values, c.cache.value_stride, b.rope_dim, num_keys_, rope_.data());
        args_.pages = nullptr;
        args_.batch = 1;
        args_.num_queries = num_queries_;
        args_.num_keys = num_keys_;
        args_.causal_offset = &num_past_;
        args_.sliding_window = 0;
        as_bf16_ = args_.cache_type == CacheType::kBF16 && goes_by_tiles(args_, num_queries_);
        args_.cache_type = as_bf16_ ? CacheType::kBF16 : CacheType::kF32;
    }
    Expanded(const Expanded&) = delete;
    Expanded& operator=(const Expanded&) = delete;

    // So many heads that their keys and values stay within kMostFloats.
    std::int64_t heads_at_once() const {
        return std::clamp<std::int64_t>(kMostFloats / (num_keys_ * (b_.nope_dim + b_.value_dim)), 1, b_.num_heads);
    }

    void attend(std::int64_t head, std::int64_t count, const float* q, float* attended) {
        float* keys = keys_.reserve(static_cast<std::size_t>(num_keys_ * count * b_.nope_dim));
        float* values = values_.reserve(static_cast<std::size_t>(num_keys_ * count * b_.value_dim));
        expand(head, count, keys, values);
        const Operand k(keys, num_keys_ * count * b_.nope_dim, as_bf16_);
        const Operand r(rope_.data(), num_keys_ * b_.rope_dim, as_bf16_);
        const Operand v(values, num_keys_ * count * b_.value_dim, as_bf16_);
        const std::int64_t width = b_.nope_dim + b_.rope_dim, row = b_.num_heads * width;
        const float* queries = q + first_query_ * row + head * width;
        AttentionArgs a = args_;
        a.parts[0] = {queries, {0, width, row}, k.data(), {0, b_.nope_dim, count * b_.nope_dim}, b_.nope_dim};
        a.parts[1] = {queries + b_.nope_dim, {0, width, row}, r.data(), {0, 0, b_.rope_dim}, b_.rope_dim};
        a.num_parts = 2;
        a.v = v.data();
        a.v_stride = {0, b_.value_dim, count * b_.value_dim};
        a.value_dim = b_.value_dim;
        a.out = attended + (first_query_ * b_.num_heads + head) * b_.value_dim;
        a.out_stride = {0, b_.value_dim, b_.num_heads * b_.value_dim};
        a.num_kv_heads = count;
        a.group = 1;
        attention(a);
    }

  private:
    void expand(std::int64_t head, std::int64_t count, float* keys, float* values) {
        const HeadMatrices k_b = heads_from(b_.k_b, head, count), v_b = heads_from(b_.v_b, head, count);
        std::vector<LinearJob> jobs;
        if (b_.k_b_transposed) {  // with respect to what queries need: keys take it as it is
            add_jobs(k_b, keys, jobs);
        } else {
            linear_transposed_heads(k_b, {latents_.data(), b_.latent_dim, 0}, {keys, count * b_.nope_dim, b_.nope_dim},
                                    num_keys_);
        }
        add_jobs(v_b, values, jobs);
        linear(jobs, {latents_.data(), b_.latent_dim}, num_keys_);
    }

    const LatentAttentionBlock& b_;
    std::int64_t first_query_, num_queries_, num_keys_, num_past_;
    AttentionArgs args_;
    bool as_bf16_ = false;
    AlignedArray<float> latents_, rope_, keys_, values_;
};

}  // namespace

bool expanding_pays(const LatentAttentionBlock& b, const AttentionBlockCall& c, std::int64_t num_queries,
                    std::int64_t num_keys) {
    if (c.paged == nullptr || c.cache.window > 0 || num_queries < kQueriesFrom || independent_rows()) return false;
    const Prices prices = goes_by_tiles(attention_of_heads(b, c), num_queries) ? kPricesByTiles : kPrices;
    const std::int64_t past = num_keys - num_queries, pairs = num_queries * past + num_queries * (num_queries + 1) / 2;
    auto with_nope = [&](bool transposed) {
        return b.latent_dim *
               ((transposed ? prices.transposed : prices.matrix) * b.nope_dim + prices.matrix * b.value_dim);
    };
    const std::int64_t absorbed =
        pairs * prices.attention * (2 * b.latent_dim + b.rope_dim) + num_queries * with_nope(b.k_b_transposed);
    const std::int64_t expanded =
        pairs * prices.attention * (b.nope_dim + b.rope_dim + b.value_dim) + num_keys * with_nope(!b.k_b_transposed);
    return expanded < absorbed;
}

void attend_expanded(const LatentAttentionBlock& b, const AttentionBlockCall& c, std::int64_t sequence, const float* q,
                     float* attended) {
    Expanded expanded(b, c, sequence);
    const std::int64_t most = expanded.heads_at_once();
    for (std::int64_t head = 0; head < b.num_heads; head += most) {
        expanded.attend(head, std::min(most, b.num_heads - head), q, attended);
    }
}

}  // namespace moesaic
