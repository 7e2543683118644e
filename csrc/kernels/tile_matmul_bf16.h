// Products of many tokens in bfloat16 by tiles; included by format_kernels.h where there are tiles.
//
// Float32 sums of 32 tokens x 32 rows stay in four tiles. Unlike the products of integers this rounds weights to 8 bits
// of mantissa, about as finely as activations are rounded to int8 elsewhere. BF16 weights are used as they lie; their
// activations come in two parts, so that nothing is lost.
//
// A chunk of the columns of two panels is in the first-level cache while all tokens pass over it, two tiles of tokens
// at a time, from the second-level cache. Weights are expanded, panel by panel between the products, during the first
// and the last pass. Fetching tokens into the first level ahead of time was tried: no faster, and slower up to 32
// tokens.

#include "kernels/tile_panels_bf16.h"

constexpr int64_t kTileValues = kTokenPadding * kBf16Step;  // of activations

// 32 columns of 2 panels and up to 2 tiles of tokens.
struct TileStep {
    const uint8_t* weights[2];
    const uint16_t* tokens[2];  // of each tile
};

template <int kTiles>
MOESAIC_INLINE void multiply_first_panel(const TileStep& s) {
    MOESAIC_TILE_LOAD(4, s.tokens[0], 64);
    MOESAIC_TILE_LOAD(6, s.weights[0], 64);
    MOESAIC_TILE_DOT_BF16(0, 4, 6);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_LOAD(5, s.tokens[1], 64);
        MOESAIC_TILE_DOT_BF16(2, 5, 6);
    }
}

// With the tokens that the first was multiplied with.
template <int kTiles>
MOESAIC_INLINE void multiply_second_panel(const TileStep& s) {
    MOESAIC_TILE_LOAD(7, s.weights[1], 64);
    MOESAIC_TILE_DOT_BF16(1, 4, 7);
    if constexpr (kTiles == 2) MOESAIC_TILE_DOT_BF16(3, 5, 7);
}

// Sums between tiles and out [tokens][kOutputStride].
template <int kTiles>
MOESAIC_INLINE void load_sums(const float* out) {
    constexpr int64_t kRowBytes = kOutputStride * 4;
    MOESAIC_TILE_LOAD(0, out, kRowBytes);
    MOESAIC_TILE_LOAD(1, out + 16, kRowBytes);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_LOAD(2, out + kTileTokens * kOutputStride, kRowBytes);
        MOESAIC_TILE_LOAD(3, out + kTileTokens * kOutputStride + 16, kRowBytes);
    }
}

template <int kTiles>
MOESAIC_INLINE void store_sums(float* out) {
    constexpr int64_t kRowBytes = kOutputStride * 4;
    MOESAIC_TILE_STORE(0, out, kRowBytes);
    MOESAIC_TILE_STORE(1, out + 16, kRowBytes);
    if constexpr (kTiles == 2) {
        MOESAIC_TILE_STORE(2, out + kTileTokens * kOutputStride, kRowBytes);
        MOESAIC_TILE_STORE(3, out + kTileTokens * kOutputStride + 16, kRowBytes);
    }
}

MOESAIC_INLINE void zero_sums() {
    MOESAIC_TILE_ZERO(0);
    MOESAIC_TILE_ZERO(1);
    MOESAIC_TILE_ZERO(2);
    MOESAIC_TILE_ZERO(3);
}

// A part of the columns: num_steps x 32 of both panels' weights.
struct TileChunk {
    const uint8_t* weights[2];
    int64_t first_step, total_steps;  // of all columns
    int num_steps;
    bool starts, loads_sums, stores_sums;  // sums begin at zero, are in `out` before, have to be there afterwards
};

// One pass over a chunk of one or two tiles of tokens, of which the first is number first_tile. prepare(s, panel) is
// called before step s of a panel: its vector work overlaps with the tile unit's.
template <int kTiles, class Prepare>
MOESAIC_INLINE void tile_block(const TileChunk& chunk, const Bf16Tokens& x, int64_t first_tile, float* out,
                               Prepare&& prepare) {
    const int64_t tile_values = chunk.total_steps * kTileValues;
    const uint16_t* tokens = x.upper + first_tile * tile_values + chunk.first_step * kTileValues;
    TileStep step{{chunk.weights[0], chunk.weights[1]}, {tokens, tokens + tile_values}};
    out += first_tile * kTileTokens * kOutputStride;
    if (chunk.starts) zero_sums();
    if (chunk.loads_sums) load_sums<kTiles>(out);
    const int64_t lower = x.lower != nullptr ? x.lower - x.upper : 0;
    MOESAIC_UNROLL  // so that a step's place in its block is a constant
        for (int s = 0; s < kChunkSteps; ++s) {
        if (s == chunk.num_steps) break;
        prepare(s, 0);
        multiply_first_panel<kTiles>(step);
        prepare(s, 1);
        multiply_second_panel<kTiles>(step);
        if (lower != 0) {
            TileStep rest = step;
            for (const uint16_t*& values : rest.tokens) values += lower;
            multiply_first_panel<kTiles>(rest);
            multiply_second_panel<kTiles>(rest);
        }
        for (const uint8_t*& weights : step.weights) weights += kStepBytes;
        for (const uint16_t*& values : step.tokens) values += kTileValues;
    }
    if (chunk.stores_sums) store_sums<kTiles>(out);
}

// All tiles of tokens, in passes of two.
template <class Panels>
void tile_blocks(const TileChunk& chunk, const Bf16Tokens& x, int64_t num_tiles, float* out, Panels& panels) {
    for (int64_t i = 0; i < num_tiles; i += 2) {
        const bool first = i == 0, last = i + 2 >= num_tiles;
        const auto prepare = [&](int s, int panel)
                                 __attribute__((always_inline)) { panels.prepare(s, panel, first, last); };
        if (i + 1 == num_tiles) {
            tile_block<1>(chunk, x, i, out, prepare);
        } else if (first || last) {
            tile_block<2>(chunk, x, i, out, prepare);
        } else {
            tile_block<2>(chunk, x, i, out, [](int, int) {});
        }
    }
}

// For the tokens of a call; all tiles but those of one or two in all are full.
MOESAIC_INLINE int64_t configure_for(int64_t num_tokens) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    const int64_t last = num_tokens - (num_tiles - 1) * kTileTokens;
    configure_tiles(static_cast<int>(num_tiles == 1 ? last : kTileTokens),
                    static_cast<int>(num_tiles == 2 ? last : kTileTokens));
    return num_tiles;
}

// Activations of a block of columns stay in the second-level cache while several pairs of panels use them.
constexpr int64_t kBlockTokenBytes = 512 << 10;

// 32s of columns in such a block, whole chunks. Sums of two tiles of tokens stay in tiles: there all columns are one
// block.
MOESAIC_INLINE int64_t steps_of_block(const Bf16Tokens& x, int64_t num_tiles, int num_panels, int64_t total_steps) {
    if (num_tiles <= 2 || num_panels <= kMaxPanels) return total_steps;
    const int64_t step_bytes = num_tiles * kTileValues * (x.lower != nullptr ? 4 : 2);
    const int64_t chunks = kBlockTokenBytes / (step_bytes * kChunkSteps);
    return chunks > 1 ? chunks * kChunkSteps : kChunkSteps;
}

// Columns [begin, end) in 32s of the one or two panels that were started.
template <class Panels>
void multiply_block(Panels& panels, int64_t begin, int64_t end, int64_t total, const Bf16Tokens& x, int64_t num_tiles,
                    float* out) {
    const bool in_tiles = num_tiles <= 2;  // sums stay there from chunk to chunk
    for (int64_t first = begin; first < end; first += kChunkSteps) {
        const int64_t after = first + kChunkSteps < end ? first + kChunkSteps : end;
        const TileChunk chunk{{panels.weights(0), panels.weights(1)},
                              first,
                              total,
                              static_cast<int>(after - first),
                              first == 0,
                              first > 0 && !in_tiles,
                              after == total || !in_tiles};
        tile_blocks(chunk, x, num_tiles, out, panels);
        panels.advance();
    }
}

template <class F, class Panels>
void tile_matmul(const uint8_t* panels, int num_panels, int64_t cols, const Bf16Tokens& x, int64_t num_tokens,
                 float* out, const uint8_t* next) {
    const int64_t num_tiles = configure_for(num_tokens), total = cols / 32;
    const int64_t panel_bytes = total * kPackedStepBytes<F>;
    const int64_t block = steps_of_block(x, num_tiles, num_panels, total);
    Panels source(x.upper, panel_bytes);
    for (int64_t begin = 0; begin < total; begin += block) {
        const int64_t end = begin + block < total ? begin + block : total;
        float* sums = out;
        for (int p = 0; p < num_panels; p += kMaxPanels, sums += num_tiles * kTileTokens * kOutputStride) {
            const uint8_t* tile = panels + p * panel_bytes + begin * kPackedStepBytes<F>;
            const uint8_t* then = p + kMaxPanels < num_panels ? tile + kMaxPanels * panel_bytes
                                  : end < total               ? panels + end * kPackedStepBytes<F>
                                                              : next;
            source.start(tile, num_panels - p < kMaxPanels ? 1 : kMaxPanels, end - begin, then);
            multiply_block(source, begin, end, total, x, num_tiles, sums);
        }
    }
    release_tiles();
}

template <class F>
void expanded_matmul_bf16(const uint8_t* panels, int num_panels, int64_t cols, const Bf16Tokens& x, int64_t num_tokens,
                          float* out, const uint8_t* next) {
    tile_matmul<F, ExpandedPanels<F>>(panels, num_panels, cols, x, num_tokens, out, next);
}

template <class F>
void bf16_matmul_bf16(const uint8_t* panels, int num_panels, int64_t cols, const Bf16Tokens& x, int64_t num_tokens,
                      float* out, const uint8_t* next) {
    tile_matmul<F, PackedPanels>(panels, num_panels, cols, x, num_tokens, out, next);
}
