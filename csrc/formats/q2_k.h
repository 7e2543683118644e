// Q2_K: blocks of 256 weights, 84 bytes: scales[16] (scale and minimum of 16 weights, 4 bits each), qs[64], d, dmin;
// value = d scale q - dmin minimum (ggml's block_q2_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q2_K {
    static constexpr const char* kName = "Q2_K";
    static constexpr int kGgmlType = 10, kBlock = 256, kBlockBytes = 84;
    static constexpr bool kQuantized = true;
    static constexpr int kScales = 0, kQs = 16, kD = 80, kDmin = 82;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kScales, 16, 1}, {kD, 2, 2}, {kDmin, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), dmin = load_half(block + kDmin);
        for (int k = 0; k < kBlock; ++k) {
            const uint8_t packed = block[kScales + k / 16];
            const int q = block[kQs + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            y[k] = d * static_cast<float>(packed & 15) * static_cast<float>(q) - dmin * static_cast<float>(packed >> 4);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScales = 1024, kTileD = 1280, kTileDmin = 1312;
    static constexpr int kScaleGroup = 16, kZeroShift = -1, kLargest = 3;
    static constexpr bool kHasOffset = true;
    struct Scales {
        vf d, negated_dmin;
        alignas(64) uint8_t scales[256], minima[256];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        s.negated_dmin = sub(set1(0.0f), load_f16(reinterpret_cast<const uint16_t*>(tile + kTileDmin)));
        for (int i = 0; i < 256; i += 64) {
            const vb packed = load_b(tile + kTileScales + i);
            store_b(s.scales + i, low_nibbles(packed));
            store_b(s.minima + i, high_nibbles(packed));
        }
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.d, to_float(load_u8(s.scales + 16 * j))); }
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        return mul(s.negated_dmin, to_float(load_u8(s.minima + 16 * j)));
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return and_b(shr_16(load_b(tile + kTileQs + 64 * (g / 4 * 8 + i)), g % 4 * 2), set1_b(3));
    }
#endif
};

}  // namespace
}  // namespace moesaic
