// Parts that the codebook formats share: entries with signs, signs in 7 bits, scales of 4 bits.
#pragma once

#include "formats/grids.h"
#include "formats/nibbles.h"

namespace moesaic {
namespace {

inline uint32_t load_u32(const uint8_t* p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

// 8 signs from 7 bits: the number of minus signs is even.
inline int signs_of_code(uint32_t code) { return static_cast<int>(code | (__builtin_popcount(code) & 1u) << 7); }

// num_weights of an entry of the IQ2 or IQ3 grids, whose bytes are 64 too much; bit k of signs: weight k is negative.
inline void signed_weights(float step, uint64_t entry, int num_weights, int signs, float* y) {
    for (int k = 0; k < num_weights; ++k) {
        const float weight = step * static_cast<float>(static_cast<int>(entry >> (8 * k) & 255u) - 64);
        y[k] = (signs >> k & 1) != 0 ? -weight : weight;
    }
}

// 8 weights of an entry of the IQ1 grid.
inline void ternary_weights(float step, uint64_t entry, float delta, float* y) {
    for (int k = 0; k < 8; ++k) {
        y[k] = step * (static_cast<float>((static_cast<int>(entry >> (8 * k) & 255u) - 5) / 4) + delta);
    }
}

#ifdef MOESAIC_ISA

// Bytes of 7 bits, each with the parity of its bits as the eighth.
MOESAIC_INLINE vb with_parity(vb codes) {
    vb p = xor_b(codes, shr_16(codes, 4));
    p = xor_b(p, shr_16(p, 2));
    p = xor_b(p, shr_16(p, 1));
    return or_b(codes, and_b(shl_16(p, 7), set1_b(0x80)));
}

// The signs of 32 weights, byte t of a lane for weights 8 t to 8 t + 7, from four codes of 7 bits.
MOESAIC_INLINE vb signs_of_codes(vb words) {
    const vb even = or_b(and_b(words, set1_lane(0x7f)), and_b(shl_32(words, 2), set1_lane(0x7f0000)));
    const vb odd = or_b(and_b(shl_32(words, 1), set1_lane(0x7f00)), and_b(shl_32(words, 3), set1_lane(0x7f000000)));
    return with_parity(or_b(even, odd));
}

// 2 s + 1 where s is the upper four bits of each lane.
MOESAIC_INLINE vf odd_scale_on_top(vb words) {
    return to_float(as_int(or_b(and_b(shr_32(words, 27), set1_lane(30)), set1_lane(1))));
}

// 2 s + 1 for each nibble s of 64 bytes.
MOESAIC_INLINE void odd_scales(const uint8_t* packed, uint8_t* low, uint8_t* high) {
    const vb both = load_b(packed), one = set1_b(1);
    store_b(low, or_b(shl_16(low_nibbles(both), 1), one));
    store_b(high, or_b(shl_16(high_nibbles(both), 1), one));
}

// Weights 8 t to 8 t + 7 of a group, with signs from byte `byte` of each lane.
template <int t, int byte>
MOESAIC_INLINE void put_signed(vb first, vb second, vb signs, vb (&quads)[8]) {
    const vb bits = repeat_byte<byte>(signs);
    quads[2 * t] = mirror<0>(first, bits);
    quads[2 * t + 1] = mirror<4>(second, bits);
}

// 32 weights by four indices in the halves of two vectors, weights 0-7 and 16-23 by `even`, the others by `odd`.
template <int N>
MOESAIC_INLINE void lookup_group(const Codebook8<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    vb four[4];
    lookup8(book, even, four);
    put_signed<0, 0>(four[0], four[1], signs, quads);
    put_signed<2, 2>(four[2], four[3], signs, quads);
    lookup8(book, odd, four);
    put_signed<1, 1>(four[0], four[1], signs, quads);
    put_signed<3, 3>(four[2], four[3], signs, quads);
}

// The same without signs, in the grid of IQ1.
MOESAIC_INLINE void lookup_ternary(vb even, vb odd, vb (&quads)[8]) {
    vb a[4], b[4];
    lookup8(kIq1Grid, even, a);
    lookup8(kIq1Grid, odd, b);
    MOESAIC_UNROLL
    for (int i = 0; i < 2; ++i) {
        quads[i] = a[i];
        quads[i + 2] = b[i];
        quads[i + 4] = a[i + 2];
        quads[i + 6] = b[i + 2];
    }
}

// Weights 16 u to 16 u + 15 of a group by four indices of entries of 4 weights.
template <int u, int N>
MOESAIC_INLINE void lookup_half_group(const Codebook4<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    vb a[2], b[2];
    lookup4(book, even, a);
    lookup4(book, odd, b);
    put_signed<2 * u, 2 * u>(a[0], b[0], signs, quads);
    put_signed<2 * u + 1, 2 * u + 1>(a[1], b[1], signs, quads);
}

#endif

}  // namespace
}  // namespace moesaic
