// Codebooks as the vocabulary looks them up: what an entry's number means, in the shapes that suit instruction sets.
//
// A level is the byte that kernels multiply; it is below 128, and 128 less it is the level of the weight with a minus
// sign. Levels are numbered, which gives entries a second form, with a few bits for each weight.
#pragma once

#include <stdint.h>

namespace moesaic {

// N entries of 8 weights of at most 4 levels.
template <int N>
struct Codebook8 {
    uint64_t bytes[N];   // byte k is weight k
    uint16_t codes[N];   // the number of weight k's level, 2 bits from bit 8 (k % 2) + 2 (k / 2) on
    uint8_t levels[16];  // by number; from 4 on those of minus signs, 8 to 15 are 0 to 7 again
    // For tables of bytes (avx512_byte_tables.h): the numbers of weights 0-3 and of weights 4-7, and what a byte of
    // these with signs in between means for each of the four.
    alignas(64) uint8_t planes[2][N];
    alignas(64) uint8_t signed_levels[4][64];
};

// N entries of 4 weights of at most 8 levels.
template <int N>
struct Codebook4 {
    uint32_t bytes[N];
    uint16_t codes[N];                 // 4 bits from bit 0, 8, 4, 12 on
    uint8_t levels[16];                // by number; from 8 on those of minus signs
    alignas(64) uint8_t planes[2][N];  // of weights 0, 1 and of weights 2, 3
    alignas(64) uint8_t signed_levels[4][64];
};

// Where a byte of a plane has the bits of the number of weight k's level and, put in between, its sign (the last). A
// lookup sees the six bits from kFirstSeen[k] on.
struct PlanesOf8 {
    static constexpr int kNumberBits = 2, kBits[4][3] = {{4, 5, 2}, {6, 7, 3}, {0, 1, 4}, {2, 3, 5}};
    static constexpr int kFirstSeen[4] = {2, 2, 0, 0};
};
struct PlanesOf4 {
    static constexpr int kNumberBits = 3, kBits[4][4] = {{0, 1, 4, 2}, {5, 6, 7, 3}, {0, 1, 2, 4}, {3, 6, 7, 5}};
    static constexpr int kFirstSeen[4] = {0, 2, 0, 2};
};

}  // namespace moesaic
