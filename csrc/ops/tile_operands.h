// Queries, keys and values as attention by tiles takes them, and where a task has them; included by tile_attention.h.

constexpr int64_t kStripe = 2 * kTileTokens;    // rows that pass through a block of keys together
constexpr int64_t kOperand = kTileTokens * 32;  // bfloat16 of a tile
constexpr int64_t kSums = kTileTokens * 16;     // floats of a tile
constexpr int64_t kKeySteps = kTileKeys / 32;   // of a block

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
