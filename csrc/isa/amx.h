// AMX (tiles of bfloat16) beside AVX-512: the vocabulary of avx512.h and, under MOESAIC_HAS_TILES, words for
// tiles.
//
// A product of tiles: c [tokens][16 rows] += a [tokens][32] b [16][16 rows][2], float32 from bfloat16. Tiles 4 and 5
// are for activations, 6 and 7 for weights, 0 and 1 for the sums of 4 with 6 and 7, 2 and 3 for those of 5.
#pragma once

// Processors with AMX gather from the first-level cache as fast as they load.
#define MOESAIC_HAS_FAST_GATHERS
#include "isa/avx512.h"

#define MOESAIC_HAS_TILES

namespace moesaic {
namespace {

constexpr int kTileTokens = 16;  // at most

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tokens of the first tile of activations and of the second, with their sums; what tiles held before is lost.
MOESAIC_INLINE void configure_tiles(int first_tokens, int second_tokens) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] =
            static_cast<uint8_t>(i >= 6 ? 16 : (i == 2 || i == 3 || i == 5 ? second_tokens : first_tokens));
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
}
// After the last use: a thread without tiles is switched faster.
MOESAIC_INLINE void release_tiles() { _tile_release(); }

// Macros, because the intrinsics paste the numbers of tiles into assembler; and the compiler does not know that those
// read and write memory.
#define MOESAIC_MEMORY_FENCE asm volatile("" ::: "memory")
#define MOESAIC_TILE_ZERO(tile) _tile_zero(tile)
#define MOESAIC_TILE_LOAD(tile, p, row_bytes) \
    do {                                      \
        MOESAIC_MEMORY_FENCE;                 \
        _tile_loadd(tile, p, row_bytes);      \
    } while (false)
#define MOESAIC_TILE_STORE(tile, p, row_bytes) \
    do {                                       \
        _tile_stored(tile, p, row_bytes);      \
        MOESAIC_MEMORY_FENCE;                  \
    } while (false)
#define MOESAIC_TILE_DOT_BF16(sum, activations, weights) _tile_dpbf16ps(sum, activations, weights)

// Byte `from` of each lane's four as a float, plus a constant: bytes up to 127 as the top of a mantissa, plus 128; any
// byte in the middle of one, plus 2^15. No shift: a mask if the byte is there, else a permute of bytes between the
// constant's.
struct PlacedBytes {
    bool small;
    constexpr float plus() const { return small ? 128.0f : 32768.0f; }
};
MOESAIC_INLINE vf byte_of_lane_as_float(PlacedBytes place, vb x, int from) {
    const int to = place.small ? 2 : 1;
    const __m512i constant = _mm512_set1_epi32(place.small ? 0x43000000 : 0x47000000);
    if (from == to) {  // (x & mask) | constant
        const __m512i mask = _mm512_set1_epi32(0xff << (8 * to));
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x.v, mask, constant, 0xea));
    }
    const int all = 0x01010101 * from;
    const __m512i bytes = _mm512_set4_epi32(all + 0x0c0c0c0c, all + 0x08080808, all + 0x04040404, all);
    const __mmask64 where = place.small ? 0x4444444444444444ull : 0x2222222222222222ull;
    return _mm512_castsi512_ps(_mm512_mask_shuffle_epi8(constant, where, x.v, bytes));
}

// Pairs of bfloat16 (even, odd), lane by lane, cut off and not rounded.
MOESAIC_INLINE vb cut_to_bf16_pairs(vf even, vf odd) {
    const __m512i upper = _mm512_set4_epi32(0x00000f0e, 0x00000b0a, 0x00000706, 0x00000302);
    return {
        _mm512_mask_shuffle_epi8(_mm512_castps_si512(odd), 0x3333333333333333ull, _mm512_castps_si512(even), upper)};
}

// The same, rounded to nearest (halves away from zero).
MOESAIC_INLINE vb round_to_bf16_pairs(vf even, vf odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    return cut_to_bf16_pairs(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(even), half)),
                             _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(odd), half)));
}

// 32 values of 16 bits from each: pairs (a, b) in lanes. `low` has the first four of every eight, `high` the others.
MOESAIC_INLINE void interleave_16(vb a, vb b, vf& low, vf& high) {
    low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a.v, b.v));
    high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a.v, b.v));
}

// x 2^n, for whole n.
MOESAIC_INLINE vf times_power_of_two(vf x, vf n) { return _mm512_scalef_ps(x, n); }

// 16 floats to bfloat16, to nearest even.
MOESAIC_INLINE void store_as_bf16(uint16_t* p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace
}  // namespace moesaic
