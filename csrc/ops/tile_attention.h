// Attention of many rows on a bfloat16 cache by tiles; included by attention.isa.cpp where there are tiles.
//
// Everything is transposed: rows are columns of tiles and lanes of vectors. Scores [keys][rows] = keys x queries take
// keys as they lie in a cache and queries in pairs of columns, made once; the softmax works without anything across
// lanes; its weights, two keys in a lane, are what sums [values][rows] += values^T x weights take. Only values have to
// be transposed, once per block of keys for all rows of a task.
//
// Queries (scaled) and weights are rounded to bfloat16, products are summed and the softmax is computed in float32.
// What a row gets depends neither on other rows of its task nor on where the task ends, because blocks begin at the
// same keys and what a row does not see adds zeros.

#include "ops/tile_operands.h"

constexpr int64_t kDepthSteps = 9;        // whose queries of a stripe should stay in the first-level cache
constexpr float kLowestMaximum = -1e30f;  // stands for that of a row that has seen nothing, where it is used

// Two tiles times two: sums 0 to 3 += (left, left + left_apart) x (right, right + right_apart), `steps` steps of 32.
MOESAIC_INLINE void multiply_tiles(const uint16_t* left, int64_t left_apart, const uint16_t* right, int64_t right_apart,
                                   int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, left += kOperand, right += kOperand) {
        MOESAIC_TILE_LOAD(4, left, 64);
        MOESAIC_TILE_LOAD(6, right, 64);
        MOESAIC_TILE_DOT_BF16(0, 4, 6);
        MOESAIC_TILE_LOAD(7, right + right_apart, 64);
        MOESAIC_TILE_DOT_BF16(1, 4, 7);
        MOESAIC_TILE_LOAD(5, left + left_apart, 64);
        MOESAIC_TILE_DOT_BF16(2, 5, 6);
        MOESAIC_TILE_DOT_BF16(3, 5, 7);
    }
}

MOESAIC_INLINE void load_tile_sums(const float* from) {
    MOESAIC_TILE_LOAD(0, from, 64);
    MOESAIC_TILE_LOAD(1, from + kSums, 64);
    MOESAIC_TILE_LOAD(2, from + 2 * kSums, 64);
    MOESAIC_TILE_LOAD(3, from + 3 * kSums, 64);
}

MOESAIC_INLINE void store_tile_sums(float* to) {
    MOESAIC_TILE_STORE(0, to, 64);
    MOESAIC_TILE_STORE(1, to + kSums, 64);
    MOESAIC_TILE_STORE(2, to + 2 * kSums, 64);
    MOESAIC_TILE_STORE(3, to + 3 * kSums, 64);
}

void tile_scores(const TileWorkspace& w, int64_t stripe, int64_t key_steps) {
    const int64_t apart = w.steps * kOperand;
    for (int64_t first = 0; first < w.steps; first += kDepthSteps) {
        const int64_t steps = w.steps - first < kDepthSteps ? w.steps - first : kDepthSteps;
        const uint16_t* queries = w.queries + stripe * 2 * apart + first * kOperand;
        for (int64_t k = 0; k < key_steps; ++k) {
            float* scores = w.scores + k * 4 * kSums;
            if (first == 0) {
                MOESAIC_TILE_ZERO(0);
                MOESAIC_TILE_ZERO(1);
                MOESAIC_TILE_ZERO(2);
                MOESAIC_TILE_ZERO(3);
            } else {
                load_tile_sums(scores);
            }
            multiply_tiles(w.keys + 2 * k * apart + first * kOperand, apart, queries, apart, steps);
            store_tile_sums(scores);
        }
    }
}

void tile_values(const TileWorkspace& w, int64_t stripe, int64_t key_steps) {
    float* out = w.out + stripe * w.value_tiles * 2 * kSums;
    constexpr int64_t kApart = kKeySteps * kOperand;
    for (int64_t tile = 0; tile < w.value_tiles; tile += 2) {
        load_tile_sums(out + tile * 2 * kSums);
        multiply_tiles(w.values + tile * kApart, kApart, w.weights, kApart, key_steps);
        store_tile_sums(out + tile * 2 * kSums);
    }
}

// The scores of key `k` of a block and sixteen rows.
MOESAIC_INLINE float* scores_of(const TileWorkspace& w, int64_t half, int64_t k) {
    return w.scores + (k / 16 * 2 + half) * kSums + k % 16 * 16;
}

// The keys of a block that rows may see, counted from its first.
struct StripeView {
    float begin[kStripe], end[kStripe];  // of each row
    int64_t num_keys;                    // up to the last that any row sees; 0: none sees any
    bool is_whole;                       // every row sees all of them
};

void look_at(const AttentionArgs& a, const AttentionTask& task, int64_t stripe, int64_t key, int64_t num_keys,
             StripeView& view) {
    auto clamped = [&](int64_t k) { return k < key ? 0 : (k > key + num_keys ? num_keys : k - key); };
    int64_t largest_begin = 0, smallest_end = num_keys, smallest_begin = num_keys;
    view.num_keys = 0;
    for (int64_t r = 0; r < kStripe; ++r) {
        const int64_t row = stripe * kStripe + r;
        const int64_t last = row < task.num_rows ? row : task.num_rows - 1;
        const KeyRange visible = visible_keys(a, task.batch, (task.row_begin + last) / a.group);
        const int64_t begin = clamped(visible.begin), end = clamped(visible.end);
        view.begin[r] = static_cast<float>(begin);
        view.end[r] = static_cast<float>(end);
        if (begin > largest_begin) largest_begin = begin;
        if (begin < smallest_begin) smallest_begin = begin;
        if (end < smallest_end) smallest_end = end;
        if (end > view.num_keys) view.num_keys = end;
    }
    if (smallest_begin >= view.num_keys) view.num_keys = 0;
    view.is_whole = largest_begin == 0 && smallest_end == view.num_keys && view.num_keys % 32 == 0;
}

void hide(const TileWorkspace& w, const StripeView& view) {
    const vf hidden = set1(kNegativeInfinity);
    for (int64_t half = 0; half < 2; ++half) {
        const vf begin = load(view.begin + 16 * half), end = load(view.end + 16 * half);
        for (int64_t k = 0; k < steps_of(view.num_keys) * 32; ++k) {
            float* scores = scores_of(w, half, k);
            const vf at = set1(static_cast<float>(k));
            const vf begun = select_positive(sub(at, begin), load(scores), hidden);
            store(scores, select_positive(sub(sub(end, at), set1(1.0f)), begun, hidden));
        }
    }
}

// e^x, given x log2(e) <= 0: within 1.1e-4 of it, which bfloat16 is far from, and zero where it is nothing in float32.
MOESAIC_INLINE vf weight_of(vf x) {
    x = max(set1(-200.0f), x);  // in this order NaN stays NaN
    const vf rounder = set1(0x1.8p23f);
    const vf n = sub(add(x, rounder), rounder);
    const vf r = sub(x, n);
    vf p = fma(set1(0.05500825778662713f), r, set1(0.2422095794400437f));  // minimax, exact at 0
    p = fma(p, r, set1(0.6932828480713547f));
    return times_power_of_two(fma(p, r, set1(1.0f)), n);
}

// The largest score of each of sixteen rows, or what it was before.
vf largest_score(const TileWorkspace& w, int64_t half, int64_t key_steps, vf before) {
    vf largest[4] = {before, before, before, before};
    for (int64_t k = 0; k < key_steps * 32; k += 16) {
        const float* scores = scores_of(w, half, k);
        MOESAIC_UNROLL
        for (int i = 0; i < 4; ++i) {
            const vf first = max(load(scores + 64 * i), load(scores + 64 * i + 16));
            const vf second = max(load(scores + 64 * i + 32), load(scores + 64 * i + 48));
            largest[i] = max(largest[i], max(first, second));
        }
    }
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
}

// Weights of sixteen rows from scores; returns their sums.
vf make_weights(const TileWorkspace& w, int64_t half, int64_t key_steps, vf maximum) {
    constexpr float kLog2E = 1.44269504088896f;
    const vf scale = set1(kLog2E), shift = mul(maximum, set1(-kLog2E));
    vf even_sum = set1(0.0f), odd_sum = even_sum;
    uint16_t* to = w.weights + half * kKeySteps * kOperand;
    for (int64_t k = 0; k < key_steps * 32; k += 16) {
        const float* scores = scores_of(w, half, k);
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i, to += 32) {
            const vf even = weight_of(fma(load(scores + 32 * i), scale, shift));
            const vf odd = weight_of(fma(load(scores + 32 * i + 16), scale, shift));
            store_b(to, round_to_bf16_pairs(even, odd));
            even_sum = add(even_sum, even);
            odd_sum = add(odd_sum, odd);
        }
    }
    return add(even_sum, odd_sum);
}

// Turns the scores of a stripe into weights relative to the running maximum, and rescales what came before.
void tile_softmax(const TileWorkspace& w, int64_t stripe, int64_t key_steps) {
    vf factors[2];
    bool changed = false;
    for (int64_t half = 0; half < 2; ++half) {
        float* maximum = w.maximum + stripe * kStripe + 16 * half;
        float* sum = w.sum + stripe * kStripe + 16 * half;
        const vf lowest = set1(kLowestMaximum), before = load(maximum);
        const vf now = largest_score(w, half, key_steps, before);
        const vf growth = sub(max(lowest, before), max(lowest, now));
        factors[half] = exp_to_zero(growth);
        changed = changed || !(reduce_max(sub(set1(0.0f), growth)) <= 0.0f);
        store(maximum, now);
        store(sum, fma(load(sum), factors[half], make_weights(w, half, key_steps, max(lowest, now))));
    }
    if (!changed) return;
    float* out = w.out + stripe * w.value_tiles * 2 * kSums;
    for (int64_t tile = 0; tile < w.value_tiles; ++tile) {
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t i = 0; i < kSums; i += 16, out += 16) store(out, mul(load(out), factors[half]));
        }
    }
}

void tile_block(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys, int64_t stripe,
                const TileWorkspace& w) {
    StripeView view;
    look_at(a, task, stripe, key, num_keys, view);
    if (view.num_keys == 0) return;
    const int64_t key_steps = steps_of(view.num_keys);
    tile_scores(w, stripe, key_steps);
    if (a.softcap != 0.0f) apply_softcap(a.softcap, key_steps * 32 * kStripe, w.scores);
    if (!view.is_whole) hide(w, view);
    tile_softmax(w, stripe, key_steps);
    tile_values(w, stripe, key_steps);
}

void write_result(const AttentionArgs& a, const AttentionTask& task, const TileWorkspace& w,
                  const AttentionPartial& result) {
    const int64_t width = padded(a.value_dim);
    for (int64_t first = 0; first < task.num_rows; first += 16) {
        const int64_t rows = task.num_rows - first < 16 ? task.num_rows - first : 16;
        const float* tiles = w.out + first / kStripe * w.value_tiles * 2 * kSums + first % kStripe / 16 * kSums;
        for (int64_t column = 0; column < width; column += 16, tiles += 2 * kSums) {
            vf block[16];
            for (int i = 0; i < 16; ++i) block[i] = load(tiles + 16 * i);
            transpose(block);
            for (int64_t r = 0; r < rows; ++r) store(result.acc + (first + r) * width + column, block[r]);
        }
        for (int64_t r = first; r < first + rows; ++r) {
            // Keys that a row does not see may have replaced a maximum that was not a number; the sum is not a number
            // still.
            result.max[r] = w.sum[r] == w.sum[r] ? w.maximum[r] : w.sum[r];
            result.sum[r] = w.sum[r];
        }
    }
}

void tile_partial(const AttentionArgs& a, const AttentionTask& task, float* scratch, const AttentionPartial& result) {
    TileWorkspace w;
    make_workspace(a, task.num_rows, scratch, w);
    for (int64_t i = 0; i < w.stripes * kStripe; ++i) {
        w.maximum[i] = kNegativeInfinity;
        w.sum[i] = 0.0f;
    }
    for (int64_t i = 0; i < w.stripes * w.value_tiles * 2 * kSums; i += 16) store(w.out + i, set1(0.0f));
    pack_queries(a, task, w);
    configure_tiles(kTileTokens, kTileTokens);
    for (int64_t key = task.key_begin; key < task.key_end; key += kTileKeys) {
        const int64_t left = task.key_end - key, after = left - kTileKeys;
        const int64_t num_keys = left < kTileKeys ? left : kTileKeys;
        pack_tile_keys(a, task, key, num_keys, w);
        pack_tile_values(a, task, key, num_keys, w);
        for (int64_t stripe = 0; stripe < w.stripes; ++stripe) {
            if (after > 0) {
                fetch_ahead(a, task, key + kTileKeys, after < kTileKeys ? after : kTileKeys, stripe, w.stripes);
            }
            tile_block(a, task, key, num_keys, stripe, w);
        }
    }
    release_tiles();
    write_result(a, task, w, result);
}
