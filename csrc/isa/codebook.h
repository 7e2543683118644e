// Codebooks as the vocabulary looks them up: what an entry's number means, in the shapes that suit instruction sets.
#pragma once

#include <stdint.h>

namespace moesaic {

// N entries of 8 weights of at most 4 levels. A level is the byte that kernels multiply; it is below 128.
template <int N>
struct Codebook8 {
    uint64_t bytes[N];   // byte k is weight k
    uint16_t codes[N];   // the number of weight k's level, 2 bits from bit 8 (k % 2) + 2 (k / 2) on
    uint8_t levels[16];  // by number
};

// N entries of 4 weights of at most 16 levels.
template <int N>
struct Codebook4 {
    uint32_t bytes[N];
    uint16_t codes[N];  // 4 bits from bit 0, 8, 4, 12 on
    uint8_t levels[16];
};

}  // namespace moesaic
