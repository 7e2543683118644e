// TQ2_0: blocks of 256 weights, 66 bytes: qs[64], d; value = d (q - 1), q of 2 bits (ggml's block_tq2_0).
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

struct TQ2_0 {
    static constexpr const char* kName = "TQ2_0";
    static constexpr int kGgmlType = 35, kBlock = 256, kBlockBytes = 66;
    static constexpr bool kQuantized = true;
    static constexpr int kQs = 0, kD = 64;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) {
            const int q = block[kQs + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            y[k] = d * static_cast<float>(q - 1);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 1024;
    static constexpr int kScaleGroup = 32, kZeroShift = 0, kLargest = 3;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return and_b(shr_16(load_b(tile + kTileQs + 64 * (g / 4 * 8 + i)), g % 4 * 2), set1_b(3));
    }
#endif
};

}  // namespace
}  // namespace moesaic
