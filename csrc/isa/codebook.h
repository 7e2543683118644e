// Codebooks as the vocabulary looks them up: what an entry's number means, in the shapes that suit instruction sets.
//
// A level is the byte that kernels multiply; it is below 128, and 128 less it is the level of the weight with a minus
// sign. Levels are numbered, which gives entries a second form, with a few bits for each weight.
#pragma once

#include <stdint.h>

namespace moesaic {

// Tables of 64 bytes in which the half of an entry is found by its number, one set for the first and one for the second
// half (weights 0-3 and 4-7, or 0, 1 and 2, 3). Grids of 512 and 1024 entries are numbered so that many entries share
// the bytes of a half: entry n's are
//
//   N             n                first half                      second half
//   512           0 .. 383         byte n / 2 of table n / 128     byte n of table n / 128
//                 384 .. 511       byte n of table n / 64 - 3      the same
//   1024          0 .. 511         byte n / 4 of table n / 256     byte n of table n / 64 % 2
//                 512 .. 1023      2 tables after those of n - 512 in a grid of 512
//   256           0 .. 255         byte n of table n / 64          the same
//
// where bytes count modulo 64.
template <int N>
constexpr int kHalfTables = N == 512    ? 5
                            : N == 1024 ? 7
                                        : N / 64;

struct HalfPlace {
    int table, byte;
};
template <int N>
constexpr HalfPlace place_of_half(int half, int n) {
    if (N == 1024 && n < 512) return half == 0 ? HalfPlace{n / 256, n / 4 % 64} : HalfPlace{n / 64 % 2, n % 64};
    if (N != 512 && N != 1024) return {n / 64, n % 64};
    const int before = N == 1024 ? 2 : 0, m = n % 512;
    if (m >= 384) return {before + m / 64 - 3, m % 64};
    return {before + m / 128, half == 0 ? m / 2 % 64 : m % 64};
}

// N entries of 8 weights of at most 4 levels, by their numbers in tiles.
template <int N>
struct Codebook8 {
    uint64_t bytes[N];   // byte k is weight k
    uint16_t codes[N];   // the number of weight k's level, 2 bits from bit 8 (k % 2) + 2 (k / 2) on
    uint8_t levels[16];  // by number; from 4 on those of minus signs, 8 to 15 are 0 to 7 again
    // For tables of bytes (avx512_byte_tables.h): the numbers of the levels of a half, and what such a byte with signs
    // in between means for each of four weights.
    alignas(64) uint8_t halves[2][kHalfTables<N>][64];
    alignas(64) uint8_t signed_levels[4][64];
};

// N entries of 4 weights of at most 8 levels.
template <int N>
struct Codebook4 {
    uint32_t bytes[N];
    uint16_t codes[N];   // 4 bits from bit 0, 8, 4, 12 on
    uint8_t levels[16];  // by number; from 8 on those of minus signs
    alignas(64) uint8_t halves[2][kHalfTables<N>][64];
    alignas(64) uint8_t signed_levels[4][64];
};

// Where the byte of a half has the bits of the number of a level (weight k % 4 of 8, or weight k of 4) and, put in
// between, its sign (the last). A lookup sees the six bits from kFirstSeen[k] on.
struct HalvesOf8 {
    static constexpr int kNumberBits = 2, kBits[4][3] = {{4, 5, 2}, {6, 7, 3}, {0, 1, 4}, {2, 3, 5}};
    static constexpr int kFirstSeen[4] = {2, 2, 0, 0};
};
struct HalvesOf4 {
    static constexpr int kNumberBits = 3, kBits[4][4] = {{0, 1, 4, 2}, {5, 6, 7, 3}, {0, 1, 2, 4}, {3, 6, 7, 5}};
    static constexpr int kFirstSeen[4] = {0, 2, 0, 2};
};

}  // namespace moesaic
