// IQ4_XS: blocks of 256 weights, 136 bytes: d, scales_h (2 bits a scale), scales_l[4] (4 bits a scale), qs[128];
// value = d (scale - 32) levels[q], a scale for 32 weights, the levels of IQ4_NL (ggml's block_iq4_xs).
#pragma once

#include "formats/iq4_nl.h"

namespace moesaic {
namespace {

struct IQ4_XS {
    static constexpr const char* kName = "IQ4_XS";
    static constexpr int kGgmlType = 23, kBlock = 256, kBlockBytes = 136;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kScalesHigh = 2, kScalesLow = 4, kQs = 8;
    static constexpr Field kFields[] = {{kQs, 128, 4}, {kScalesLow, 4, 1}, {kScalesHigh, 2, 1}, {kD, 2, 2}};

    // Scale j of 8, from its byte of scales_l and its byte of scales_h.
    static int scale_of(int j, int low, int high) {
        return (low >> (j % 2 * 4) & 15) + (high >> (j % 4 * 2) & 3) * 16 - 32;
    }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int j = 0; j < 8; ++j) {
            const int scale = scale_of(j, block[kScalesLow + j / 2], block[kScalesHigh + j / 4]);
            const float step = d * static_cast<float>(scale);
            for (int k = 0; k < 32; ++k) {
                const int q = nibble_of_32(block + kQs + 16 * j, k);
                y[32 * j + k] = step * static_cast<float>(IQ4_NL::kLevels[q] - 128);
            }
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScalesLow = 2048, kTileScalesHigh = 2112, kTileD = 2144;
    static constexpr int kScaleGroup = 32, kZeroShift = 7, kLargest = 241;
    static constexpr int kGroupPeriod = 2;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
        alignas(64) int8_t scales[128];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        for (int j = 0; j < 8; ++j) {
            const uint8_t *low = tile + kTileScalesLow + j / 2 * 16, *high = tile + kTileScalesHigh + j / 4 * 16;
            for (int row = 0; row < 16; ++row) {
                s.scales[16 * j + row] = static_cast<int8_t>(scale_of(j, low[row], high[row]));
            }
        }
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.d, to_float(load_i8(s.scales + 16 * j))); }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return lookup16(nibble_quad(tile + kTileQs + 256 * g, i), IQ4_NL::kLevels);
    }
#endif
};

}  // namespace
}  // namespace moesaic
