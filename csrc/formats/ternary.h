// Weights of -1, 0, 1 as digits to the base 3, five in a byte: how IQ1_S and IQ1_M can be held in memory, so that they
// are decoded by arithmetic and not by a grid of 2048 entries. Files never have blocks like these; recoding keeps scales
// and the sign of delta, so that values stay what they are, to the bit.
//
// Byte 4 v + b of 52 has the digits of weights 20 v + b + 4 n, n = 0 to 4: a vector of the tile is five quads, one
// after the other. The byte is a fraction of 256, as in TQ1_0: digit n is the integer part of three times it, after n
// multiplications by three modulo 256.
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

constexpr int kTernaryBytes = 52;  // of 256 weights; the last digits are of none, and 0

// Weight k of a block, -1, 0 or 1.
inline int ternary_weight(const uint8_t* qs, int k) {
    constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    const uint8_t fraction = static_cast<uint8_t>(qs[k / 20 * 4 + k % 4] * kPowers[k / 4 % 5]);
    return (fraction * 3 >> 8) - 1;
}

// The bytes of 32 entries of the grid of IQ1, 8 weights each.
inline void ternary_bytes(const int (&indices)[32], uint8_t* qs) {
    for (int j = 0; j < kTernaryBytes; ++j) {
        int number = 0;
        for (int n = 0; n < 5; ++n) {
            const int k = j / 4 * 20 + j % 4 + 4 * n;
            const int byte = k < 256 ? static_cast<int>(kIq1Grid.bytes[indices[k / 8]] >> (k % 8 * 8) & 255u) : 1;
            number = 3 * number + byte / 4;  // 1, 5, 9: digits 0, 1, 2
        }
        qs[j] = static_cast<uint8_t>((number * 256 + 242) / 243);
    }
}

// 8 weights from k on.
inline void ternary_weights(float step, const uint8_t* qs, int k, float delta, float* y) {
    for (int i = 0; i < 8; ++i) y[i] = step * (static_cast<float>(ternary_weight(qs, k + i)) + delta);
}

#ifdef MOESAIC_ISA

MOESAIC_INLINE vb three_times(vb fractions) { return add_b(add_b(fractions, fractions), fractions); }

// 64 (digit + 1) and up to 63 more: three quarters of the fraction and 64, the rounding made good by the constant.
MOESAIC_INLINE vb digit_on_top(vb fractions) { return avg_b(fractions, avg_b(fractions, set1_b(253))); }

// The 8 quads of group g: 2^bits (digit + 1), digit + 1 = weight + 2.
template <int bits>
MOESAIC_INLINE void ternary_group(const uint8_t* tile_qs, int g, vb (&quads)[8]) {
    const uint8_t* at = tile_qs + 8 * g / 5 * 64;
    int digit = 8 * g % 5;
    vb fractions = load_b(at);
    MOESAIC_UNROLL
    for (int n = 0; n < 4; ++n) {
        if (n < digit) fractions = three_times(fractions);
    }
    MOESAIC_UNROLL
    for (int i = 0; i < 8; ++i) {
        quads[i] = and_b(shr_16(digit_on_top(fractions), 6 - bits), set1_b(3 << bits));
        if (i == 7) return;
        if (++digit == 5) {
            digit = 0;
            at += 64;
            fractions = load_b(at);
        } else {
            fractions = three_times(fractions);
        }
    }
}

#endif

}  // namespace
}  // namespace moesaic
