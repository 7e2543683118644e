// Q6_K: blocks of 256 weights, 210 bytes: ql[128] (four bits), qh[64] (two bits), scales[16] (int8), d;
// value = d scale (q - 32), scale of 16 weights (ggml's block_q6_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q6_K {
    static constexpr const char* kName = "Q6_K";
    static constexpr int kGgmlType = 14, kBlock = 256, kBlockBytes = 210;
    static constexpr bool kQuantized = true;
    static constexpr int kQl = 0, kQh = 128, kScales = 192, kD = 208;
    static constexpr Field kFields[] = {{kQl, 128, 4}, {kQh, 64, 4}, {kScales, 16, 1}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) {
            const int low = block[kQl + k / 128 * 64 + k % 64] >> (k / 64 % 2 * 4) & 15;
            const int high = block[kQh + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            const auto scale = static_cast<int8_t>(block[kScales + k / 16]);
            y[k] = d * static_cast<float>(scale) * static_cast<float>((low | high << 4) - 32);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQl = 0, kTileQh = 2048, kTileScales = 3072, kTileD = 3328;
    static constexpr int kScaleGroup = 16, kZeroShift = 5, kLargest = 63;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
        const uint8_t* scales;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)), tile + kTileScales};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.d, to_float(load_i8(s.scales + 16 * j))); }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        const vb both = load_b(tile + kTileQl + 64 * (g / 4 * 16 + g % 2 * 8 + i));
        const vb low = g % 4 < 2 ? low_nibbles(both) : high_nibbles(both);
        const vb high = load_b(tile + kTileQh + 64 * (g / 4 * 8 + i));
        const int shift = 4 - g % 4 * 2;
        return or_b(low, and_b(shift >= 0 ? shl_16(high, shift) : shr_16(high, -shift), set1_b(0x30)));
    }
#endif
};

}  // namespace
}  // namespace moesaic
