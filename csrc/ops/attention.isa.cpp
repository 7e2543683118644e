#include "ops/attention.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

#include "ops/cache_load.h"
#include "ops/product.h"

constexpr int64_t kDepthBlock = 256;  // depth of a product whose panel of keys should stay in the first-level cache
constexpr float kNegativeInfinity = -__builtin_inff();

// Buffers of a task, cut from its scratch.
struct Workspace {
    float* q;       // [rows][depth], scaled
    float* keys;    // [key block / 16][depth][16]
    float* values;  // [key block][padded(value_dim)], where the cache cannot be read as it lies
    float* scores;  // [rows][key block]
    int64_t depth, value_width;
};

int64_t scratch_floats(const AttentionArgs& a, int64_t num_rows) {
    const int64_t depth = score_depth(a);
    return num_rows * depth + kAttentionKeyBlock * depth + kAttentionKeyBlock * padded(a.value_dim) +
           num_rows * kAttentionKeyBlock;
}

Workspace make_workspace(const AttentionArgs& a, int64_t num_rows, float* scratch) {
    Workspace w;
    w.depth = score_depth(a);
    w.value_width = padded(a.value_dim);
    w.q = scratch;
    w.keys = w.q + num_rows * w.depth;
    w.values = w.keys + kAttentionKeyBlock * w.depth;
    w.scores = w.values + kAttentionKeyBlock * w.value_width;
    return w;
}

// e^x for x <= 0, exactly zero for what is too small, so that hidden keys have no weight at all.
vf exp_to_zero(vf x) { return select_positive(sub(set1(-87.0f), x), set1(0.0f), exp(x)); }

// The larger one; NaN if b is.
float larger(float a, float b) { return b <= a ? a : b; }

float exp_scalar(float x) { return reduce_max(exp_to_zero(set1(x))); }

void copy_scaled_row(const float* from, int64_t n, vf scale, float* to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(to + i, mul(load(from + i), scale));
    if (i < n) store(to + i, mul(load_n(from + i, static_cast<int>(n - i)), scale));
}

void gather_queries(const AttentionArgs& a, const AttentionTask& task, const Workspace& w) {
    const vf scale = set1(a.scale);
    for (int64_t r = 0; r < task.num_rows; ++r) {
        const int64_t token = (task.row_begin + r) / a.group;
        const int64_t head = task.kv_head * a.group + (task.row_begin + r) % a.group;
        float* to = w.q + r * w.depth;
        for (int i = 0; i < a.num_parts; ++i) {
            const ScorePart& part = a.parts[i];
            const Strides3& s = part.q_stride;
            copy_scaled_row(part.q + query_offset(a, s, task.batch, token) + head * s.head, part.dim, scale, to);
            to += padded(part.dim);
        }
    }
}

// Dimensions [0, dim / 32 * 32) of sixteen bfloat16 keys become columns: pairs of values are moved as if they were
// floats and split afterwards, which halves the shuffles. Returns how many dimensions are done.
int64_t transpose_bf16_pairs(const uint16_t* from, int64_t stride, int64_t num_keys, int64_t dim, float* to) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {
        vf pairs[16];
        for (int k = 0; k < 16; ++k) {
            pairs[k] = k < num_keys ? load(reinterpret_cast<const float*>(from + k * stride + i)) : set1(0.0f);
        }
        transpose(pairs);
        for (int k = 0; k < 16; ++k) {
            uint16_t column[32];
            __builtin_memcpy(column, &pairs[k], sizeof(column));
            vf even, odd;
            load_bf16_pairs(column, even, odd);
            store(to + (i + 2 * k) * 16, even);
            store(to + (i + 2 * k + 1) * 16, odd);
        }
    }
    return i;
}

// Sixteen keys (missing ones are zero) become columns: to[i] holds value i of each of them.
template <class Load>
void transpose_keys(const typename Load::Element* from, int64_t stride, int64_t num_keys, int64_t dim, float* to) {
    int64_t i = 0;
    if constexpr (Load::kIsBF16) i = transpose_bf16_pairs(from, stride, num_keys, dim, to);
    for (; i < dim; i += 16) {
        vf tile[16];
        const int width = dim - i < 16 ? static_cast<int>(dim - i) : 16;
        for (int k = 0; k < 16; ++k) {
            const typename Load::Element* p = from + k * stride + i;
            tile[k] = k >= num_keys ? set1(0.0f) : (width == 16 ? Load::full(p) : Load::partial(p, width));
        }
        transpose(tile);
        for (int k = 0; k < 16; ++k) store(to + (i + k) * 16, tile[k]);
    }
}

// Keys (or values) that the block after this one reads: each row is fetched while one of this block is worked on, since
// rows of one head lie too far apart for the processor to see what comes.
template <class Element>
struct NextRows {
    const Element* data;
    int64_t stride, count, bytes;  // of a row

    void fetch(int64_t begin, int64_t end) const {
        for (int64_t k = begin; k < end && k < count; ++k) {
            const char* row = reinterpret_cast<const char*>(data + k * stride);
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
        }
    }
};

// Those behind `num_keys` keys from `key` on that are the task's.
template <class Element>
NextRows<Element> rows_after(const AttentionArgs& a, const AttentionTask& task, const void* data, const Strides3& s,
                             int64_t dim, int64_t key, int64_t num_keys) {
    const int64_t next = key + num_keys, left = task.key_end - next, step = key_step(a);
    if (left <= 0) return {nullptr, 0, 0, 0};
    return {static_cast<const Element*>(data) + key_offset(a, s, task.batch, next) + task.kv_head * s.head, s.token,
            left < step ? left : step, dim * static_cast<int64_t>(sizeof(Element))};
}

template <class Load>
void pack_keys(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys, const Workspace& w) {
    using Element = typename Load::Element;
    const ScorePart& leading = a.parts[0];
    const auto next = rows_after<Element>(a, task, leading.k, leading.k_stride, leading.dim, key, num_keys);
    for (int64_t first = 0; first < num_keys; first += 16) {
        next.fetch(first, first + 16);
        float* to = w.keys + first * w.depth;
        for (int i = 0; i < a.num_parts; ++i) {
            const ScorePart& part = a.parts[i];
            const Strides3& s = part.k_stride;
            const auto* from = static_cast<const typename Load::Element*>(part.k) + key_offset(a, s, task.batch, key) +
                               task.kv_head * s.head + first * s.token;
            transpose_keys<Load>(from, s.token, num_keys - first, part.dim, to);
            to += padded(part.dim) * 16;
        }
    }
}

struct Values {
    const float* data;
    int64_t stride;
};

// float32 values of whole vectors are used where they lie, all others are converted into the workspace.
template <class Load>
Values load_values(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys,
                   const Workspace& w) {
    const Strides3& s = a.v_stride;
    const int64_t offset = key_offset(a, s, task.batch, key) + task.kv_head * s.head;
    if (a.cache_type == CacheType::kF32 && a.value_dim % 16 == 0)
        return {static_cast<const float*>(a.v) + offset, s.token};
    const auto* from = static_cast<const typename Load::Element*>(a.v) + offset;
    const auto next = rows_after<typename Load::Element>(a, task, a.v, s, a.value_dim, key, num_keys);
    for (int64_t k = 0; k < num_keys; ++k) {
        next.fetch(k, k + 1);
        for (int64_t i = 0; i < a.value_dim; i += 16) {
            const int width = static_cast<int>(a.value_dim - i);
            const auto* p = from + k * s.token + i;
            store(w.values + k * w.value_width + i, width >= 16 ? Load::full(p) : Load::partial(p, width));
        }
    }
    return {w.values, w.value_width};
}

void compute_scores(const AttentionTask& task, int64_t num_keys, const Workspace& w) {
    for (int64_t k = 0; k < w.depth; k += kDepthBlock) {
        ProductArgs p;
        p.a = w.q + k;
        p.a_row = w.depth;
        p.b = w.keys + k * 16;
        p.b_step = 16;
        p.b_vector = w.depth * 16;
        p.c = w.scores;
        p.c_row = kAttentionKeyBlock;
        p.rows = task.num_rows;
        p.vectors = (num_keys + 15) / 16;
        p.depth = w.depth - k < kDepthBlock ? w.depth - k : kDepthBlock;
        p.accumulate = k > 0;
        product(p);
    }
}

void add_values(const AttentionTask& task, const Values& values, int64_t num_keys, const Workspace& w, float* acc) {
    ProductArgs p;
    p.a = w.scores;
    p.a_row = kAttentionKeyBlock;
    p.b = values.data;
    p.b_step = values.stride;
    p.b_vector = 16;
    p.c = acc;
    p.c_row = w.value_width;
    p.rows = task.num_rows;
    p.vectors = w.value_width / 16;
    p.depth = num_keys;
    p.accumulate = true;
    product(p);
}

void apply_softcap(float cap, int64_t num_keys, float* scores) {
    const vf limit = set1(cap), inverse = set1(1.0f / cap);
    for (int64_t i = 0; i < num_keys; i += 16) store(scores + i, mul(limit, tanh(mul(load(scores + i), inverse))));
}

// What the mask says about `num_keys` keys from `key` on, for one row.
void apply_mask(const AttentionArgs& a, int64_t batch, int64_t head, int64_t token, int64_t key, int64_t num_keys,
                float* scores) {
    if (a.mask_type == MaskType::kNone) return;
    const int64_t offset = batch * a.mask_stride.batch + head * a.mask_stride.head + token * a.mask_stride.token + key;
    if (a.mask_type == MaskType::kAdditive) {
        const float* mask = static_cast<const float*>(a.mask) + offset;
        for (int64_t i = 0; i < num_keys; ++i) scores[i] += mask[i];
    } else {
        const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + offset;
        for (int64_t i = 0; i < num_keys; ++i) scores[i] = mask[i] != 0 ? scores[i] : kNegativeInfinity;
    }
}

void scale_row(float* row, int64_t width, float factor) {
    for (int64_t i = 0; i < width; i += 16) store(row + i, mul(load(row + i), set1(factor)));
}

// Turns the scores of one row into weights relative to the running maximum, and rescales what came before.
void update_softmax(float* scores, int64_t num_keys, float& row_max, float& row_sum, float* acc, int64_t value_width) {
    const int64_t width = padded(num_keys);
    vf largest = load(scores);
    for (int64_t i = 16; i < width; i += 16) largest = max(largest, load(scores + i));
    const float new_max = larger(row_max, reduce_max(largest));
    if (new_max == kNegativeInfinity) {  // nothing is visible so far
        for (int64_t i = 0; i < width; i += 16) store(scores + i, set1(0.0f));
        return;
    }
    if (new_max != row_max) {
        const float factor = exp_scalar(row_max - new_max);
        row_sum *= factor;
        scale_row(acc, value_width, factor);
        row_max = new_max;
    }
    vf total = set1(0.0f);
    for (int64_t i = 0; i < width; i += 16) {
        const vf weight = exp_to_zero(sub(load(scores + i), set1(new_max)));
        store(scores + i, weight);
        total = add(total, weight);
    }
    row_sum += reduce_add(total);
}

void softmax_row(const AttentionArgs& a, const AttentionTask& task, int64_t r, int64_t key, int64_t num_keys,
                 const Workspace& w, const AttentionPartial& result) {
    const int64_t token = (task.row_begin + r) / a.group;
    const int64_t head = task.kv_head * a.group + (task.row_begin + r) % a.group;
    float* scores = w.scores + r * kAttentionKeyBlock;
    if (a.softcap != 0.0f) apply_softcap(a.softcap, num_keys, scores);
    apply_mask(a, task.batch, head, token, key, num_keys, scores);
    const KeyRange visible = visible_keys(a, task.batch, token);
    for (int64_t i = 0; i < visible.begin - key && i < num_keys; ++i) scores[i] = kNegativeInfinity;
    const int64_t hidden_from = visible.end < key ? 0 : visible.end - key;
    for (int64_t i = hidden_from; i < padded(num_keys); ++i) scores[i] = kNegativeInfinity;
    update_softmax(scores, num_keys, result.max[r], result.sum[r], result.acc + r * w.value_width, w.value_width);
}

// Does the mask let any row of the task see any of these keys? Only a boolean mask can rule that out.
bool any_visible(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys) {
    if (a.mask_type != MaskType::kBool) return true;
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + task.batch * a.mask_stride.batch + key;
    for (int64_t r = 0; r < task.num_rows; ++r) {
        const int64_t token = (task.row_begin + r) / a.group;
        const int64_t head = task.kv_head * a.group + (task.row_begin + r) % a.group;
        const uint8_t* row = mask + head * a.mask_stride.head + token * a.mask_stride.token;
        uint8_t seen = 0;
        for (int64_t i = 0; i < num_keys; ++i) seen |= row[i];
        if (seen != 0) return true;
    }
    return false;
}

template <class Load>
void partial_of(const AttentionArgs& a, const AttentionTask& task, float* scratch, const AttentionPartial& result) {
    const Workspace w = make_workspace(a, task.num_rows, scratch);
    for (int64_t r = 0; r < task.num_rows; ++r) {
        result.max[r] = kNegativeInfinity;
        result.sum[r] = 0.0f;
        for (int64_t i = 0; i < w.value_width; i += 16) store(result.acc + r * w.value_width + i, set1(0.0f));
    }
    gather_queries(a, task, w);
    const int64_t step = key_step(a);
    for (int64_t key = task.key_begin; key < task.key_end; key += step) {
        const int64_t left = task.key_end - key;
        const int64_t num_keys = left < step ? left : step;
        if (!any_visible(a, task, key, num_keys)) continue;
        pack_keys<Load>(a, task, key, num_keys, w);
        compute_scores(task, num_keys, w);
        for (int64_t r = 0; r < task.num_rows; ++r) softmax_row(a, task, r, key, num_keys, w, result);
        add_values(task, load_values<Load>(a, task, key, num_keys, w), num_keys, w, result.acc);
    }
}

void partial(const AttentionArgs& a, const AttentionTask& task, float* scratch, const AttentionPartial& result) {
    switch (a.cache_type) {
        case CacheType::kF32:
            return partial_of<LoadF32>(a, task, scratch, result);
        case CacheType::kBF16:
            return partial_of<LoadBF16>(a, task, scratch, result);
        case CacheType::kF16:
            return partial_of<LoadF16>(a, task, scratch, result);
    }
}

void fold(const AttentionArgs& a, int64_t num_rows, const AttentionPartial& into, const AttentionPartial& from) {
    const int64_t width = padded(a.value_dim);
    for (int64_t r = 0; r < num_rows; ++r) {
        if (from.max[r] == kNegativeInfinity) continue;
        const float new_max = larger(into.max[r], from.max[r]);
        // Exactly 1 and 0 where one of the two is all there is, so that segments without visible keys may be left out.
        const float old_factor = into.max[r] == new_max ? 1.0f : exp_scalar(into.max[r] - new_max);
        const float factor = from.max[r] == new_max ? 1.0f : exp_scalar(from.max[r] - new_max);
        float* acc = into.acc + r * width;
        const float* more = from.acc + r * width;
        for (int64_t i = 0; i < width; i += 16) {
            store(acc + i, fma(set1(factor), load(more + i), mul(set1(old_factor), load(acc + i))));
        }
        into.sum[r] = into.sum[r] * old_factor + from.sum[r] * factor;
        into.max[r] = new_max;
    }
}

void finish_row(const AttentionArgs& a, int64_t r, float sink, const AttentionPartial* partials, int64_t count,
                float* out) {
    const int64_t value_width = padded(a.value_dim);
    float row_max = sink;
    for (int64_t i = 0; i < count; ++i) row_max = larger(row_max, partials[i].max[r]);
    // A row that may see nothing has no maximum: its output is zero.
    const bool empty = row_max == kNegativeInfinity;
    float row_sum = empty ? 1.0f : exp_scalar(sink - row_max);
    for (int64_t i = 0; i < count && !empty; ++i) {
        row_sum += partials[i].sum[r] * exp_scalar(partials[i].max[r] - row_max);
    }
    for (int64_t d = 0; d < a.value_dim; d += 16) {
        vf value = set1(0.0f);
        for (int64_t i = 0; i < count && !empty; ++i) {
            const vf weight = set1(exp_scalar(partials[i].max[r] - row_max) / row_sum);
            value = fma(weight, load(partials[i].acc + r * value_width + d), value);
        }
        if (a.value_dim - d >= 16) {
            store(out + d, value);
        } else {
            store_n(out + d, value, static_cast<int>(a.value_dim - d));
        }
    }
}

void finish(const AttentionArgs& a, const AttentionTask& task, const AttentionPartial* partials, int64_t count) {
    for (int64_t r = 0; r < task.num_rows; ++r) {
        const int64_t token = (task.row_begin + r) / a.group;
        const int64_t head = task.kv_head * a.group + (task.row_begin + r) % a.group;
        const Strides3& s = a.out_stride;
        float* out = a.out + query_offset(a, s, task.batch, token) + head * s.head;
        finish_row(a, r, a.sinks == nullptr ? kNegativeInfinity : a.sinks[head], partials, count, out);
    }
}

#ifdef MOESAIC_HAS_TILES
#include "ops/tile_attention.h"
#else
constexpr int64_t (*tile_scratch_floats)(const AttentionArgs&, int64_t) = nullptr;
constexpr void (*tile_partial)(const AttentionArgs&, const AttentionTask&, float*, const AttentionPartial&) = nullptr;
#endif

}  // namespace

const AttentionKernels& attention_kernels() {
    static constexpr AttentionKernels kernels{scratch_floats, partial, fold, finish, tile_scratch_floats, tile_partial};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
