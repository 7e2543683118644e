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

// Other numbers for the entries of a block, whose low bytes and whose high bits, `bits` of each in 8 bytes, lie apart.
template <int bits, int N>
void renumber_entries(uint8_t* low, uint8_t* high, const uint16_t (&to)[N]) {
    constexpr int kOfByte = 8 / bits, kMask = (1 << bits) - 1;
    for (int g = 0; g < 8; ++g, low += kOfByte) {
        const int before = high[g];
        int after = 0;
        for (int i = 0; i < kOfByte; ++i) {
            const int number = to[low[i] | (before >> (bits * i) & kMask) << 8];
            low[i] = static_cast<uint8_t>(number);
            after |= number >> 8 << (bits * i);
        }
        high[g] = static_cast<uint8_t>(after);
    }
}

#ifdef MOESAIC_ISA

// The signs of 32 weights, byte t of a lane for weights 8 t to 8 t + 7, from four codes of 7 bits.
MOESAIC_INLINE vb signs_of_codes(vb words) { return with_parity(spread_sevens(words)); }

// x (2 s + 1) where s is the upper four bits of each lane.
MOESAIC_INLINE vf times_odd_on_top(vb words, const Factor& x) {
    return times_bits(as_int(shr_32(words, 27)), 30, x, 1);
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

#ifdef MOESAIC_HAS_BYTE_TABLES
// Quads of four entries of 8 weights, with signs of entry t in byte t of a lane, such that the first two entries and
// the last two have quads of their own: the second halves, turned by two bytes, have the first entries where the first
// halves have the last.
constexpr int kOrderOfTurnedHalves[8] = {0, 2, 1, 3, 5, 7, 4, 6};
template <int N>
MOESAIC_INLINE void quads_by_sixteens(const Codebook8<N>& book, const vb (&halves)[2], vb signs, vb (&quads)[8]) {
    const vb turned = rotate_32<16>(halves[1]);
    signed_quads(book, select_b(0x0000ffff, halves[0], turned), bits_from<-2, 6, 2, 10>(signs), quads);
    signed_quads(book, select_b(0x0000ffff, turned, halves[0]), bits_from<18, 26, 14, 22>(signs), quads + 4);
}
#endif

#endif

}  // namespace
}  // namespace moesaic
