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

constexpr int64_t kStripe = 2 * kTileTokens;    // rows that pass through a block of keys together
constexpr int64_t kOperand = kTileTokens * 32;  // bfloat16 of a tile
constexpr int64_t kSums = kTileTokens * 16;     // floats of a tile
constexpr int64_t kKeySteps = kTileKeys / 32;   // of a block
constexpr int64_t kDepthSteps = 9;              // whose queries of a stripe should stay in the first-level cache
constexpr float kLowestMaximum = -1e30f;        // stands for that of a row that has seen nothing, where it is used

static constexpr int64_t steps_of(int64_t n) { return (n + 31) / 32; }

int64_t depth_steps(const AttentionArgs& a) {
    int64_t steps = 0;
    for (int i = 0; i < a.num_parts; ++i) steps += steps_of(a.parts[i].dim);
    return steps;
}

// Buffers of a task.
struct TileWorkspace {
    int64_t steps;        // of 32 columns of queries and keys
    int64_t value_tiles;  // of 16 columns of values, even
    int64_t stripes;
    float *maximum, *sum;  // [stripes][32]
    float* out;            // [stripes][value_tiles][2][16 values][16 rows]
    float* scores;         // of a stripe: [keys / 16][2][16 keys][16 rows]
    uint16_t* weights;     // of a stripe: [2][kKeySteps][16 pairs of keys][16 rows][2]
    uint16_t* queries;     // [stripes][2][steps][16 pairs of columns][16 rows][2]
    uint16_t* keys;        // [kTileKeys / 16][steps][16 keys][32 columns]
    uint16_t* values;      // [value_tiles][kKeySteps][16 values][32 keys]
};

// Cut from `memory` (null: none is there yet); returns how many floats it is in all.
int64_t make_workspace(const AttentionArgs& a, int64_t num_rows, float* memory, TileWorkspace& w) {
    w.steps = depth_steps(a);
    w.value_tiles = 2 * steps_of(a.value_dim);
    w.stripes = (num_rows + kStripe - 1) / kStripe;
    int64_t taken = 0;
    auto floats = [&](int64_t n) {
        taken += n;
        return memory == nullptr ? nullptr : memory + (taken - n);
    };
    auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(floats(n / 2)); };
    w.maximum = floats(w.stripes * kStripe);
    w.sum = floats(w.stripes * kStripe);
    w.out = floats(w.stripes * w.value_tiles * 2 * kSums);
    w.scores = floats(kTileKeys * kStripe);
    w.weights = halves(2 * kKeySteps * kOperand);
    w.queries = halves(w.stripes * 2 * w.steps * kOperand);
    w.keys = halves(kTileKeys / 16 * w.steps * kOperand);
    w.values = halves(w.value_tiles * kKeySteps * kOperand);
    return taken;
}

int64_t tile_scratch_floats(const AttentionArgs& a, int64_t num_rows) {
    TileWorkspace w;
    return make_workspace(a, num_rows, nullptr, w);
}

vf load_some(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    return n > 0 ? load_n(p, static_cast<int>(n)) : set1(0.0f);
}

// The first n of 32 values of a cache, the others zero.
MOESAIC_INLINE vb load_32(const uint16_t* p, int64_t n) {
    if (n >= 32) return load_b(p);
    alignas(64) uint16_t first[32];
    for (int i = 0; i < 32; ++i) first[i] = i < n ? p[i] : uint16_t{0};
    return load_b(first);
}

void pack_queries(const AttentionArgs& a, const AttentionTask& task, const TileWorkspace& w) {
    const vf scale = set1(a.scale);
    for (int64_t tile = 0; tile < 2 * w.stripes; ++tile) {
        uint16_t* to = w.queries + tile * w.steps * kOperand;
        for (int i = 0; i < a.num_parts; ++i) {
            const ScorePart& part = a.parts[i];
            for (int64_t column = 0; column < part.dim; column += 32, to += kOperand) {
                alignas(64) uint16_t rows[16][32] = {};
                for (int64_t r = 0; r < 16 && tile * 16 + r < task.num_rows; ++r) {
                    const int64_t row = task.row_begin + tile * 16 + r;
                    const int64_t head = task.kv_head * a.group + row % a.group;
                    const float* from = part.q + query_offset(a, part.q_stride, task.batch, row / a.group) +
                                        head * part.q_stride.head + column;
                    const int64_t left = part.dim - column;
                    store_as_bf16(rows[r], mul(load_some(from, left), scale));
                    store_as_bf16(rows[r] + 16, mul(load_some(from + 16, left - 16), scale));
                }
                vf pairs[16];
                for (int r = 0; r < 16; ++r) pairs[r] = load(reinterpret_cast<const float*>(rows[r]));
                transpose(pairs);
                for (int k = 0; k < 16; ++k) store(reinterpret_cast<float*>(to + 32 * k), pairs[k]);
            }
        }
    }
}

// Where one key, or value, of the cache lies.
const uint16_t* cache_row(const AttentionArgs& a, const AttentionTask& task, const void* data, const Strides3& s,
                          int64_t key) {
    return static_cast<const uint16_t*>(data) + key_offset(a, s, task.batch, key) + task.kv_head * s.head;
}

// Keys that are missing in the last step of 32 are zero.
void pack_tile_keys(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys,
                    const TileWorkspace& w) {
    for (int64_t k = 0; k < steps_of(num_keys) * 32; ++k) {
        uint16_t* to = w.keys + k / 16 * w.steps * kOperand + k % 16 * 32;
        for (int i = 0; i < a.num_parts; ++i) {
            const ScorePart& part = a.parts[i];
            const uint16_t* from = k < num_keys ? cache_row(a, task, part.k, part.k_stride, key + k) : nullptr;
            for (int64_t column = 0; column < part.dim; column += 32, to += kOperand) {
                store_b(to, from != nullptr ? load_32(from + column, part.dim - column) : set1_b(0));
            }
        }
    }
}

// 32 columns of 32 values become rows: to[tile of 16 columns][..][16 columns][32 keys], tiles kKeySteps apart.
void transpose_values(const uint16_t* const (&from)[32], int64_t column, int64_t columns, uint16_t* to) {
    vf low[16], high[16];
    for (int pair = 0; pair < 16; ++pair) {
        vb rows[2];
        for (int i = 0; i < 2; ++i) {
            const uint16_t* row = from[2 * pair + i];
            rows[i] = row != nullptr ? load_32(row + column, columns) : set1_b(0);
        }
        interleave_16(rows[0], rows[1], low[pair], high[pair]);
    }
    transpose(low);
    transpose(high);
    for (int i = 0; i < 16; ++i) {  // four of each eight columns are in `low`
        const int of_low = 8 * (i / 4) + i % 4, of_high = of_low + 4;
        store(reinterpret_cast<float*>(to + of_low / 16 * kKeySteps * kOperand + of_low % 16 * 32), low[i]);
        store(reinterpret_cast<float*>(to + of_high / 16 * kKeySteps * kOperand + of_high % 16 * 32), high[i]);
    }
}

void pack_tile_values(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys,
                      const TileWorkspace& w) {
    for (int64_t step = 0; step < steps_of(num_keys); ++step) {
        const uint16_t* rows[32];
        for (int64_t k = 0; k < 32; ++k) {
            const int64_t i = 32 * step + k;
            rows[k] = i < num_keys ? cache_row(a, task, a.v, a.v_stride, key + i) : nullptr;
        }
        for (int64_t column = 0; column < a.value_dim; column += 32) {
            uint16_t* to = w.values + (column / 16 * kKeySteps + step) * kOperand;
            transpose_values(rows, column, a.value_dim - column, to);
        }
    }
}

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

// Part `index` of `count` of the rows of a block, so that they have come from memory when they are packed.
void fetch_ahead(const AttentionArgs& a, const AttentionTask& task, int64_t key, int64_t num_keys, int64_t index,
                 int64_t count) {
    for (int64_t k = num_keys * index / count; k < num_keys * (index + 1) / count; ++k) {
        for (int i = 0; i < a.num_parts; ++i) {
            const uint16_t* row = cache_row(a, task, a.parts[i].k, a.parts[i].k_stride, key + k);
            for (int64_t column = 0; column < a.parts[i].dim; column += 32) prefetch_far(row + column);
        }
        const uint16_t* row = cache_row(a, task, a.v, a.v_stride, key + k);
        for (int64_t column = 0; column < a.value_dim; column += 32) prefetch_far(row + column);
    }
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
