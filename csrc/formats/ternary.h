// Weights of -1, 0, 1 as digits to the base 3, five in a byte: how IQ1_S and IQ1_M can be held in memory, so that they
// are decoded by arithmetic and not by a grid of 2048 entries. Files never have blocks like these; recoding keeps
// scales and the sign of delta, so that values stay what they are, to the bit.
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
    uint8_t digits[5 * kTernaryBytes] = {};
    for (int t = 0; t < 32; ++t) {
        const uint64_t entry = kIq1Grid.bytes[indices[t]] >> 2 & 0x0303030303030303u;  // 1, 5, 9: digits 0, 1, 2
        memcpy(digits + 8 * t, &entry, sizeof(entry));
    }
    for (int v = 0; v < kTernaryBytes / 4; ++v) {
        uint32_t numbers = 0;  // four at once, none above 242
        for (int n = 0; n < 5; ++n) numbers = 3 * numbers + load_u32(digits + 20 * v + 4 * n);
        for (int b = 0; b < 4; ++b) {
            qs[4 * v + b] = static_cast<uint8_t>(((numbers >> (8 * b) & 255u) * 256 + 242) / 243);
        }
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

// The fractions of which quad i of group g is the next digit, for i = 0 to 7 in turn.
struct TernaryWalk {
    const uint8_t* at;
    int digit;
    vb fractions;
};
MOESAIC_INLINE TernaryWalk walk_group(const uint8_t* tile_qs, int g) {
    TernaryWalk walk{tile_qs + 8 * g / 5 * 64, 8 * g % 5, load_b(tile_qs + 8 * g / 5 * 64)};
    MOESAIC_UNROLL
    for (int n = 0; n < 4; ++n) {
        if (n < walk.digit) walk.fractions = three_times(walk.fractions);
    }
    return walk;
}
// `rest`: three times the fractions.
MOESAIC_INLINE void walk_on(TernaryWalk& walk, vb rest) {
    if (++walk.digit < 5) {
        walk.fractions = rest;
    } else {
        walk.at += 64;
        walk.digit = 0;
        walk.fractions = load_b(walk.at);
    }
}

// The 8 quads of group g: 2^bits (digit + 1), digit + 1 = weight + 2.
template <int bits>
MOESAIC_INLINE void ternary_group(const uint8_t* tile_qs, int g, vb (&quads)[8]) {
    TernaryWalk walk = walk_group(tile_qs, g);
    MOESAIC_UNROLL
    for (int i = 0; i < 8; ++i) {
        quads[i] = and_b(shr_16(digit_on_top(walk.fractions), 6 - bits), set1_b(3 << bits));
        if (i < 7) walk_on(walk, three_times(walk.fractions));
    }
}

// How many bits a digit may be raised for dot4(): to where digit_on_top() has it, or not at all.
constexpr int kRaisedDigit = kFullRangeBias == 0 ? 6 : 0;

// Where dot4<true>() is one instruction (kHasByteDots), digits are not needed. A digit is (3 f - f') / 256, f' being
// what the three times f leave, so sums of f and of f' times the activations do. They are exact as floats, too.
struct TernarySums {
    vi fractions, rests;
};
MOESAIC_INLINE void add_quad(TernarySums& sums, TernaryWalk& walk, const int8_t* four) {
    const vb rest = three_times(walk.fractions);
    sums.fractions = dot4<true>(sums.fractions, walk.fractions, four);
    sums.rests = dot4<true>(sums.rests, rest, four);
    walk_on(walk, rest);
}
MOESAIC_INLINE vf digits_times_256(const TernarySums& sums) {
    return sub(mul(to_float(sums.fractions), set1(3.0f)), to_float(sums.rests));
}

#endif

}  // namespace
}  // namespace moesaic
