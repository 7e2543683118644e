// Q8_0: blocks of 32 weights, 34 bytes: d, qs[32] (int8); value = d q (ggml's block_q8_0). The kernels see q + 128.
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

struct Q8_0 {
    static constexpr const char* kName = "Q8_0";
    static constexpr int kGgmlType = 8, kBlock = 32, kBlockBytes = 34;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2;
    static constexpr Field kFields[] = {{kQs, 32, 4}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) y[k] = d * static_cast<float>(static_cast<int8_t>(block[kQs + k]));
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 512;
    static constexpr int kScaleGroup = 32, kZeroShift = 7, kLargest = 255;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) {
        return xor_b(load_b(tile + kTileQs + 64 * i), set1_b(128));
    }
#endif
};

}  // namespace
}  // namespace moesaic
