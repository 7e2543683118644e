// Products of many tokens in bfloat16 by tiles; included by format_kernels.h where there are tiles.
//
// Weights in blocks are expanded to bfloat16, scales applied (AMX has no cheap way to scale integer sums), and float32
// sums of 32 tokens x 32 rows stay in four tiles. Unlike the products of integers this rounds weights to 8 bits of
// mantissa, about as finely as activations are rounded to int8 elsewhere. BF16 weights are used as they lie; their
// activations come in two parts, so that nothing is lost.

// Weights are cut to bfloat16, not rounded. Stretched by this they are right in the mean, and values that fit into
// bfloat16 stay what they are: the stretch is less than the distance to the next.
constexpr float kCutStretch = 1.0f + 0x1p-8f * 0.72f;

constexpr int kStepBytes = 1024;  // of a tile of weights: 32 columns x 16 rows
constexpr int kChunkSteps = kChunkGroups;

// Group g of a tile of weights as [16 pairs of columns][16 rows][2] bfloat16.
template <class F>
MOESAIC_INLINE void expand_bf16_group(const uint8_t* tile, const typename F::Scales& scales, int g, uint8_t* out) {
    vb quads[8];
    quads_of_group<F>(tile, scales, g, quads);
    constexpr float kZero = F::kZeroShift >= 0 ? static_cast<float>(1 << F::kZeroShift) : 0.0f;
    vf scale, offset;
    MOESAIC_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i % (8 / kSubs<F>) == 0) {
            const int sub = g * kSubs<F> + i / (8 / kSubs<F>);
            scale = mul(F::scale(scales, sub), set1(kCutStretch));
            offset = mul(scale, set1(-256.0f - kZero));
            if constexpr (F::kHasOffset) offset = fma(F::offset(scales, sub), set1(kCutStretch), offset);
        }
        const vf w0 = fma(byte_of_lane_plus_256<0>(quads[i]), scale, offset);
        const vf w1 = fma(byte_of_lane_plus_256<1>(quads[i]), scale, offset);
        const vf w2 = fma(byte_of_lane_plus_256<2>(quads[i]), scale, offset);
        const vf w3 = fma(byte_of_lane_plus_256<3>(quads[i]), scale, offset);
        store_b(out + 128 * i, cut_to_bf16_pairs(w0, w1));
        store_b(out + 128 * i + 64, cut_to_bf16_pairs(w2, w3));
    }
}

constexpr int64_t kTileValues = kTokenPadding * kBf16Step;  // of activations

// The same of a float format in blocks (FP8): step g of 32 columns of a block.
template <class F>
MOESAIC_INLINE void expand_bf16_floats(const uint8_t* tile, vf scale, int g, uint8_t* out) {
    MOESAIC_UNROLL
    for (int k = 0; k < 32; k += F::kStep) {
        vf w[F::kStep];
        F::load_weights(tile + 16 * (32 * g + k), w);
        MOESAIC_UNROLL
        for (int s = 0; s < F::kStep; s += 2) {
            store_b(out + 32 * (k + s), cut_to_bf16_pairs(mul(w[s], scale), mul(w[s + 1], scale)));
        }
    }
}

// 32 columns of up to 2 panels and up to 2 tiles of tokens.
struct TileStep {
    const uint8_t* weights[2];
    const uint16_t* tokens[2];  // of each tile
};

template <int kTiles, int kPanels>
MOESAIC_INLINE void tile_step(const TileStep& s) {
    MOESAIC_TILE_LOAD(4, s.tokens[0], 64);
    MOESAIC_TILE_LOAD(6, s.weights[0], 64);
    MOESAIC_TILE_DOT_BF16(0, 4, 6);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_LOAD(5, s.tokens[1], 64);
        MOESAIC_TILE_DOT_BF16(2, 5, 6);
    }
    if constexpr (kPanels == 2) {
        MOESAIC_TILE_LOAD(7, s.weights[1], 64);
        MOESAIC_TILE_DOT_BF16(1, 4, 7);
        if constexpr (kTiles == 2) MOESAIC_TILE_DOT_BF16(3, 5, 7);
    }
}

// Sums between tiles and out [tokens][kOutputStride].
template <int kTiles, int kPanels>
MOESAIC_INLINE void load_sums(const float* out) {
    constexpr int64_t kRowBytes = kOutputStride * 4;
    MOESAIC_TILE_LOAD(0, out, kRowBytes);
    if constexpr (kPanels == 2) MOESAIC_TILE_LOAD(1, out + 16, kRowBytes);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_LOAD(2, out + kTileTokens * kOutputStride, kRowBytes);
        if constexpr (kPanels == 2) MOESAIC_TILE_LOAD(3, out + kTileTokens * kOutputStride + 16, kRowBytes);
    }
}

template <int kTiles, int kPanels>
MOESAIC_INLINE void store_sums(float* out) {
    constexpr int64_t kRowBytes = kOutputStride * 4;
    MOESAIC_TILE_STORE(0, out, kRowBytes);
    if constexpr (kPanels == 2) MOESAIC_TILE_STORE(1, out + 16, kRowBytes);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_STORE(2, out + kTileTokens * kOutputStride, kRowBytes);
        if constexpr (kPanels == 2) MOESAIC_TILE_STORE(3, out + kTileTokens * kOutputStride + 16, kRowBytes);
    }
}

MOESAIC_INLINE void zero_sums() {
    MOESAIC_TILE_ZERO(0);
    MOESAIC_TILE_ZERO(1);
    MOESAIC_TILE_ZERO(2);
    MOESAIC_TILE_ZERO(3);
}

// A part of the columns: num_steps x 32 of both panels' weights, step_bytes apart.
struct TileChunk {
    const uint8_t* weights[2];
    int64_t first_step, total_steps;  // of all columns
    int num_steps;
    bool starts, loads_sums, stores_sums;  // sums begin at zero, are in `out` before, have to be there afterwards
};

// prepare(s) is called so many steps before step s is computed: its vector work overlaps with the tile unit's, and what
// it stored has left the store buffer, from which tiles cannot be loaded.
constexpr int kPrepareAhead = 2;

// One pass over a chunk of one or two tiles of tokens, of which the first is number first_tile.
template <int kTiles, int kPanels, class Prepare>
MOESAIC_INLINE void tile_block(const TileChunk& chunk, const Bf16Tokens& x, int64_t first_tile, float* out,
                               Prepare&& prepare) {
    const uint16_t* tokens = x.upper + (first_tile * chunk.total_steps + chunk.first_step) * kTileValues;
    TileStep step{{chunk.weights[0], chunk.weights[1]}, {tokens, tokens + chunk.total_steps * kTileValues}};
    out += first_tile * kTileTokens * kOutputStride;
    if (chunk.starts) zero_sums();
    if (chunk.loads_sums) load_sums<kTiles, kPanels>(out);
    const int64_t lower = x.lower != nullptr ? x.lower - x.upper : 0;
    for (int s = 0; s < kPrepareAhead; ++s) prepare(s);
    MOESAIC_UNROLL  // so that a group's place in its block is a constant
        for (int s = 0; s < kChunkSteps; ++s) {
        if (s == chunk.num_steps) break;
        prepare(s + kPrepareAhead);
        tile_step<kTiles, kPanels>(step);
        if (lower != 0) {
            TileStep rest = step;
            for (const uint16_t*& values : rest.tokens) values += lower;
            tile_step<kTiles, kPanels>(rest);
        }
        for (const uint8_t*& weights : step.weights) weights += kStepBytes;
        for (const uint16_t*& values : step.tokens) values += kTileValues;
    }
    if (chunk.stores_sums) store_sums<kTiles, kPanels>(out);
}

// All tiles of tokens from first_tile on.
template <int kPanels>
void tile_blocks(const TileChunk& chunk, const Bf16Tokens& x, int64_t first_tile, int64_t num_tiles, float* out) {
    const auto nothing = [](int) {};
    int64_t i = first_tile;
    for (; i + 2 <= num_tiles; i += 2) tile_block<2, kPanels>(chunk, x, i, out, nothing);
    if (i < num_tiles) tile_block<1, kPanels>(chunk, x, i, out, nothing);
}

// For the tokens of a call; all tiles but those of one or two in all are full.
MOESAIC_INLINE int64_t configure_for(int64_t num_tokens) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    const int64_t last = num_tokens - (num_tiles - 1) * kTileTokens;
    configure_tiles(static_cast<int>(num_tiles == 1 ? last : kTileTokens),
                    static_cast<int>(num_tiles == 2 ? last : kTileTokens));
    return num_tiles;
}

// What is loaded once per block of a panel.
template <class F>
struct ScalesOfBlock {
    using Type = vf;
};
template <class F>
    requires(F::kQuantized)
struct ScalesOfBlock<F> {
    using Type = typename F::Scales;
};
template <class F>
using ScalesOf = typename ScalesOfBlock<F>::Type;

// kChunkSteps groups of up to two panels in bfloat16, made one step at a time.
template <class F>
class Bf16Panels {
  public:
    void start(const uint8_t* tile, int64_t panel_bytes, int num_panels, int num_steps) {
        tile_ = tile;
        panel_bytes_ = panel_bytes;
        num_panels_ = num_panels;
        num_steps_ = num_steps;
    }
    __attribute__((always_inline)) void expand(int step) {
        constexpr int kGroups = F::kBlock / 32;
        if (step >= kChunkSteps || step >= num_steps_) return;
        for (int p = 0; p < num_panels_; ++p) {
            const uint8_t* tile = tile_ + p * panel_bytes_ + step / kGroups * (16 * F::kBlockBytes);
            if constexpr (F::kQuantized) {
                if (step % kGroups == 0) scales_[p] = F::load_scales(tile);
                expand_bf16_group<F>(tile, scales_[p], step % kGroups, weights_[p][step]);
            } else {
                if (step % kGroups == 0) scales_[p] = mul(F::load_scale(tile), set1(kCutStretch));
                expand_bf16_floats<F>(tile, scales_[p], step % kGroups, weights_[p][step]);
            }
        }
    }
    const uint8_t* weights(int panel) const { return weights_[panel][0]; }

  private:
    const uint8_t* tile_;
    int64_t panel_bytes_;
    int num_panels_, num_steps_;
    ScalesOf<F> scales_[2];
    alignas(64) uint8_t weights_[2][kChunkSteps][kStepBytes];
};

template <class F>
void expanded_matmul_bf16(const uint8_t* panels, int num_panels, int64_t cols, const Bf16Tokens& x, int64_t num_tokens,
                          float* out, const uint8_t* next) {
    constexpr int64_t kChunkBytes = kChunkGroups * 32 / F::kBlock * 16 * F::kBlockBytes;
    const int64_t num_tiles = configure_for(num_tokens);
    const int64_t total = cols / 32, panel_bytes = cols / F::kBlock * 16 * F::kBlockBytes;
    Bf16Panels<F> expanded;
    for (int64_t first = 0; first < total; first += kChunkSteps) {
        const int here = static_cast<int>(total - first < kChunkSteps ? total - first : kChunkSteps);
        const uint8_t* tile = panels + first / kChunkSteps * kChunkBytes;
        const bool last = first + kChunkSteps >= total;
        for (int p = 0; p < num_panels; ++p) {
            prefetch_chunk(last ? next + p * panel_bytes : tile + p * panel_bytes + kChunkBytes, kChunkBytes);
        }
        const bool in_tiles = num_tiles <= 2;  // sums stay there from chunk to chunk
        const TileChunk chunk{{expanded.weights(0), expanded.weights(1)},
                              first,
                              cols / 32,
                              here,
                              first == 0,
                              first > 0 && !in_tiles,
                              last || !in_tiles};
        expanded.start(tile, panel_bytes, num_panels, here);
        if (num_panels == 2 && num_tiles >= 2) {
            tile_block<2, 2>(chunk, x, 0, out, [&](int s) { expanded.expand(s); });
            tile_blocks<2>(chunk, x, 2, num_tiles, out);
            continue;
        }
        MOESAIC_UNROLL
        for (int s = 0; s < kChunkSteps; ++s) expanded.expand(s);
        if (num_panels == 2) {
            tile_blocks<2>(chunk, x, 0, num_tiles, out);
        } else {
            tile_blocks<1>(chunk, x, 0, num_tiles, out);
        }
    }
    release_tiles();
}

// BF16 weights lie as tiles want them; columns beyond the last multiple of 32 are not done.
template <class F>
void bf16_matmul_bf16(const uint8_t* panels, int num_panels, int64_t cols, const Bf16Tokens& x, int64_t num_tokens,
                      float* out, const uint8_t* next) {
    const int64_t num_tiles = configure_for(num_tokens);
    const int64_t panel_bytes = cols * 16 * F::kBlockBytes;
    for (int64_t first = 0; first < cols / 32; first += kChunkSteps) {
        const int64_t left = cols / 32 - first;
        const int here = static_cast<int>(left < kChunkSteps ? left : kChunkSteps);
        const uint8_t* at = panels + first * kStepBytes;
        const uint8_t* then = left > kChunkSteps ? at + kChunkSteps * kStepBytes : next;
        for (int p = 0; p < num_panels; ++p) prefetch_chunk(then + p * panel_bytes, kChunkSteps * kStepBytes);
        const bool in_tiles = num_tiles <= 2;
        const TileChunk chunk{
            {at, at + panel_bytes},          first, cols / 32, here, first == 0, first > 0 && !in_tiles,
            left <= kChunkSteps || !in_tiles};
        if (num_panels == 2) {
            tile_blocks<2>(chunk, x, 0, num_tiles, out);
        } else {
            tile_blocks<1>(chunk, x, 0, num_tiles, out);
        }
    }
    release_tiles();
}
