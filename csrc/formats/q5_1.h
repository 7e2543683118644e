// Q5_1: blocks of 32 weights, 24 bytes: d, m, qh[4], qs[16]; value = d q + m, q of 5 bits (ggml's block_q5_1).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q5_1 {
    static constexpr const char* kName = "Q5_1";
    static constexpr int kGgmlType = 7, kBlock = 32, kBlockBytes = 24;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kM = 2, kQh = 4, kQs = 8;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kQh, 4, 4, true}, {kD, 2, 2}, {kM, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), m = load_half(block + kM);
        for (int k = 0; k < kBlock; ++k)
            y[k] = d * static_cast<float>(nibble_of_32(block + kQs, k) | bit_of_32(block + kQh, k) << 4) + m;
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileQh = 256, kTileD = 320, kTileM = 352;
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = 31;
    static constexpr bool kHasOffset = true;
    struct Scales {
        vf d, m;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)),
                load_f16(reinterpret_cast<const uint16_t*>(tile + kTileM))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vf offset(const Scales& s, int) { return s.m; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) {
        return or_b(nibble_quad(tile + kTileQs, i), fifth_bit_quad(tile + kTileQh, i));
    }
#endif
};

}  // namespace
}  // namespace moesaic
