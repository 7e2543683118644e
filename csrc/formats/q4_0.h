// Q4_0: blocks of 32 weights, 18 bytes: d, qs[16]; value = d (q - 8), q of 4 bits (ggml's block_q4_0).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q4_0 {
    static constexpr const char* kName = "Q4_0";
    static constexpr int kGgmlType = 2, kBlock = 32, kBlockBytes = 18;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) y[k] = d * static_cast<float>(nibble_of_32(block + kQs, k) - 8);
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 256;
    static constexpr int kScaleGroup = 32, kZeroShift = 3, kLargest = 15;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) { return nibble_quad(tile + kTileQs, i); }
#endif
};

}  // namespace
}  // namespace moesaic
