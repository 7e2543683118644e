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

// The signs of 32 weights, byte t of a lane for weights 8 t to 8 t + 7, from four codes of 7 bits.
MOESAIC_INLINE vb signs_of_codes(vb words) { return with_parity(spread_sevens(words)); }

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

// 32 weights of the grid of IQ1, by indices in the halves of `even` (the first and the third) and `odd`.
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

#endif

}  // namespace
}  // namespace moesaic
