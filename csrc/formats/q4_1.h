// Q4_1: blocks of 32 weights, 20 bytes: d, m, qs[16]; value = d q + m, q of 4 bits (ggml's block_q4_1).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q4_1 {
    static constexpr const char* kName = "Q4_1";
    static constexpr int kGgmlType = 3, kBlock = 32, kBlockBytes = 20;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kM = 2, kQs = 4;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kD, 2, 2}, {kM, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), m = load_half(block + kM);
        for (int k = 0; k < kBlock; ++k) y[k] = d * static_cast<float>(nibble_of_32(block + kQs, k)) + m;
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 256, kTileM = 288;
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = 15;
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
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) { return nibble_quad(tile + kTileQs, i); }
#endif
};

}  // namespace
}  // namespace moesaic
