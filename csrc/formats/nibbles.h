// Parts that formats share: 32 weights as 16 bytes of two nibbles, the fifth bit, k-quants' scales.
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

// Weight k of a block of 32: the low nibble of byte k, or the high one of byte k - 16 (Q4_0, Q4_1, Q5_0, Q5_1).
inline int nibble_of_32(const uint8_t* qs, int k) { return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4; }

inline int bit_of_32(const uint8_t* qh, int k) { return qh[k / 8] >> (k % 8) & 1; }

// The 8 six-bit scales and minima of Q4_K and Q5_K, in 12 bytes: the low six bits of bytes 0-3 and 4-7 are scales and
// minima 0-3; scales and minima 4-7 are the nibbles of bytes 8-11 under the top two bits of the former.
inline void six_bit_scales(const uint8_t* packed, uint8_t* scales, uint8_t* minima) {
    for (int j = 0; j < 4; ++j) {
        scales[j] = packed[j] & 63;
        minima[j] = packed[j + 4] & 63;
        scales[j + 4] = static_cast<uint8_t>((packed[j + 8] & 15) | packed[j] >> 6 << 4);
        minima[j + 4] = static_cast<uint8_t>(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
    }
}

#ifdef MOESAIC_ISA

// Bits of a byte as a kernel may take them: where they are, if bytes there are not too large for dot4() (times 2^n,
// which scales make good), else moved down.
template <int kBits>
struct RaisedBits {
    static constexpr int kMost = kFullRangeBias == 0 ? 255 : 15;
    static constexpr int kMask = (1 << kBits) - 1;

    // How far above bit 0 field k of a byte is left.
    static constexpr int raise(int k) {
        const int at = kBits * k;
        return kMask << at <= kMost ? at : kMask << at % 4 <= kMost ? at % 4 : 0;
    }
    static constexpr int largest(int k) { return kMask << raise(k); }
    static constexpr int kLargest = largest(8 / kBits - 1);
    static constexpr float unit(int k) { return 1.0f / static_cast<float>(1 << raise(k)); }
    MOESAIC_INLINE vb of(vb x, int k) {
        return and_b(shr_16(x, kBits * k - raise(k)), set1_b(static_cast<uint8_t>(kMask << raise(k))));
    }
};
using TwoBits = RaisedBits<2>;
using Nibbles = RaisedBits<4>;

MOESAIC_INLINE vb low_nibbles(vb x) { return and_b(x, set1_b(15)); }
MOESAIC_INLINE vb high_nibbles(vb x) { return and_b(shr_16(x, 4), set1_b(15)); }

// Weights 4 i .. 4 i + 3 of 16 rows of a nibble_of_32 field.
MOESAIC_INLINE vb nibble_quad(const uint8_t* qs, int i) {
    return i < 4 ? low_nibbles(load_b(qs + 64 * i)) : high_nibbles(load_b(qs + 64 * (i - 4)));
}

// Their fifth bits, from a bit plane, as 0 or 16.
MOESAIC_INLINE vb fifth_bit_quad(const uint8_t* qh, int i) {
    const vb plane = load_b(qh);
    return and_b(i < 4 ? shl_16(plane, 4 - i) : shr_16(plane, i - 4), set1_b(16));
}

// six_bit_scales of 16 rows, [8][16] bytes each.
MOESAIC_INLINE void six_bit_scales_of_tile(const uint8_t* packed, uint8_t (&scales)[128], uint8_t (&minima)[128]) {
    const vb a = load_b(packed), b = load_b(packed + 64), c = load_b(packed + 128);
    const vb low6 = set1_b(63), top2 = set1_b(0x30);
    store_b(scales, and_b(a, low6));
    store_b(minima, and_b(b, low6));
    store_b(scales + 64, or_b(low_nibbles(c), and_b(shr_16(a, 2), top2)));
    store_b(minima + 64, or_b(high_nibbles(c), and_b(shr_16(b, 2), top2)));
    leave_in_memory(scales);
    leave_in_memory(minima);
}

#endif

}  // namespace
}  // namespace moesaic
