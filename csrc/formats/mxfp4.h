// MXFP4: blocks of 32 weights, 17 bytes: e, qs[16]; value = 2^(e - 128) levels[q], q of 4 bits (ggml's block_mxfp4; OCP
// Microscaling Formats 1.0: E2M1 floats, here counted twice, under an E8M0 scale, here halved).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct MXFP4 {
    static constexpr const char* kName = "MXFP4";
    static constexpr int kGgmlType = 39, kBlock = 32, kBlockBytes = 17;
    static constexpr bool kQuantized = true;
    static constexpr int kE = 0, kQs = 1;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kE, 1, 1}};
    // Levels plus 16: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
    static constexpr uint8_t kLevels[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

    static void dequantize(const uint8_t* block, float* y) {
        const uint32_t e = block[kE];
        const float d = bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        for (int k = 0; k < kBlock; ++k) y[k] = d * static_cast<float>(kLevels[nibble_of_32(block + kQs, k)] - 16);
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileE = 256;
    static constexpr int kScaleGroup = 32, kZeroShift = 4, kLargest = 28;
    static constexpr bool kHasOffset = false, kHasWideScales = true;  // up to 2^127
    struct Scales {
        vf d;
    };
    // The ends of the exponent's range, 2^-128 and 2^127, become 0 and infinity: no activation makes use of them.
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {mul(as_float(shl(load_u8(tile + kTileE), 23)), set1(0.5f))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) {
        return lookup16(nibble_quad(tile + kTileQs, i), kLevels);
    }
#endif
};

}  // namespace
}  // namespace moesaic
