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
    uint64_t bytes[N];     // byte k is weight k
    uint16_t codes[N];     // the number of weight k's level, 2 bits from bit 8 (k % 2) + 2 (k / 2) on
    uint8_t planes[2][N];  // the same, of weights 0-3 and of weights 4-7: 2 bits from bit 2 (k % 4) on
    uint8_t levels[16];    // by number; from 4 on those of minus signs, 8 to 15 are 0 to 7 again
};

// N entries of 4 weights of at most 8 levels.
template <int N>
struct Codebook4 {
    uint32_t bytes[N];
    uint16_t codes[N];     // 4 bits from bit 0, 8, 4, 12 on
    uint8_t planes[2][N];  // of weights 0, 1 and of weights 2, 3: 4 bits each
    uint8_t levels[16];    // by number; from 8 on those of minus signs
};

}  // namespace moesaic
