// Q5_K: blocks of 256 weights, 176 bytes: d, dmin, scales[12] (8 scales and minima of 6 bits), qh[32] (fifth bits),
// qs[128]; value = d scale q - dmin minimum, scale and minimum of 32 weights (ggml's block_q5_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q5_K {
    static constexpr const char* kName = "Q5_K";
    static constexpr int kGgmlType = 13, kBlock = 256, kBlockBytes = 176;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kDmin = 2, kScales = 4, kQh = 16, kQs = 48;
    static constexpr Field kFields[] = {{kQs, 128, 4}, {kQh, 32, 4}, {kScales, 12, 1}, {kD, 2, 2}, {kDmin, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), dmin = load_half(block + kDmin);
        uint8_t scales[8], minima[8];
        six_bit_scales(block + kScales, scales, minima);
        for (int k = 0; k < kBlock; ++k) {
            const int low = block[kQs + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
            const int high = block[kQh + k % 32] >> (k / 32) & 1;
            y[k] = d * static_cast<float>(scales[k / 32]) * static_cast<float>(low + 16 * high) -
                   dmin * static_cast<float>(minima[k / 32]);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileQh = 2048, kTileScales = 2560, kTileD = 2752, kTileDmin = 2784;
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = 31;
    static constexpr bool kHasOffset = true;
    struct Scales {
        Factor d, negated_dmin;
        alignas(64) uint8_t scales[128], minima[128];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = factor(load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)));
        s.negated_dmin = factor(mul(load_f16(reinterpret_cast<const uint16_t*>(tile + kTileDmin)), set1(-1.0f)));
        six_bit_scales_of_tile(tile + kTileScales, s.scales, s.minima);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return times_bits(load_u8(s.scales + 16 * j), 0x3f, s.d); }
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        return times_bits(load_u8(s.minima + 16 * j), 0x3f, s.negated_dmin);
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        const vb both = load_b(tile + kTileQs + 64 * (g / 2 * 8 + i));
        const vb low = g % 2 == 0 ? low_nibbles(both) : high_nibbles(both);
        const vb mask = load_b(tile + kTileQh + 64 * i);
        return or_b(low, and_b(g < 4 ? shl_16(mask, 4 - g) : shr_16(mask, g - 4), set1_b(16)));
    }
#endif
};

}  // namespace
}  // namespace moesaic
