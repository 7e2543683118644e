// Q5_0: blocks of 32 weights, 22 bytes: d, qh[4], qs[16]; value = d (q - 16), q of 5 bits (ggml's block_q5_0).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q5_0 {
    static constexpr const char* kName = "Q5_0";
    static constexpr int kGgmlType = 6, kBlock = 32, kBlockBytes = 22;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQh = 2, kQs = 6;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kQh, 4, 4, true}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k)
            y[k] = d * static_cast<float>((nibble_of_32(block + kQs, k) | bit_of_32(block + kQh, k) << 4) - 16);
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileQh = 256, kTileD = 320;
    static constexpr int kScaleGroup = 32, kZeroShift = 4, kLargest = 31;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) {
        return or_b(nibble_quad(tile + kTileQs, i), fifth_bit_quad(tile + kTileQh, i));
    }
#endif
};

}  // namespace
}  // namespace moesaic
