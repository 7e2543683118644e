// Q4_K: blocks of 256 weights, 144 bytes: d, dmin, scales[12] (8 scales and minima of 6 bits), qs[128];
// value = d scale q - dmin minimum, scale and minimum of 32 weights (ggml's block_q4_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q4_K {
    static constexpr const char* kName = "Q4_K";
    static constexpr int kGgmlType = 12, kBlock = 256, kBlockBytes = 144;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kDmin = 2, kScales = 4, kQs = 16;
    static constexpr Field kFields[] = {{kQs, 128, 4}, {kScales, 12, 1}, {kD, 2, 2}, {kDmin, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), dmin = load_half(block + kDmin);
        uint8_t scales[8], minima[8];
        six_bit_scales(block + kScales, scales, minima);
        for (int k = 0; k < kBlock; ++k) {
            const int low = block[kQs + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
            y[k] = d * static_cast<float>(scales[k / 32]) * static_cast<float>(low) -
                   dmin * static_cast<float>(minima[k / 32]);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScales = 2048, kTileD = 2240, kTileDmin = 2272;
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = Nibbles::kLargest;
    static constexpr int kGroupPeriod = 2;
    static constexpr int largest(int g) { return Nibbles::largest(g % 2); }  // byte of group g
    static constexpr bool kHasOffset = true;
    struct Scales {
        Factor d[2], negated_dmin;  // d for groups g % 2
        alignas(64) uint8_t scales[128], minima[128];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        const vf d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        const vf dmin = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileDmin));
        for (int i = 0; i < 2; ++i) s.d[i] = factor(mul(d, set1(Nibbles::unit(i))));
        s.negated_dmin = factor(mul(dmin, set1(-1.0f)));
        six_bit_scales_of_tile(tile + kTileScales, s.scales, s.minima);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return times_bits(load_u8(s.scales + 16 * j), 0x3f, s.d[j % 2]); }
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        return times_bits(load_u8(s.minima + 16 * j), 0x3f, s.negated_dmin);
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return Nibbles::of(load_b(tile + kTileQs + 64 * (g / 2 * 8 + i)), g % 2);
    }
#endif
};

}  // namespace
}  // namespace moesaic
