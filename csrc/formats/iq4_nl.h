// IQ4_NL: blocks of 32 weights, 18 bytes: d, qs[16]; value = d levels[q], q of 4 bits (ggml's block_iq4_nl).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct IQ4_NL {
    static constexpr const char* kName = "IQ4_NL";
    static constexpr int kGgmlType = 20, kBlock = 32, kBlockBytes = 18;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2;
    static constexpr Field kFields[] = {{kQs, 16, 4}, {kD, 2, 2}};
    // Levels plus 128: bytes that lie closer together where weights of a bell curve do.
    static constexpr uint8_t kLevels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) y[k] = d * static_cast<float>(kLevels[nibble_of_32(block + kQs, k)] - 128);
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 256;
    static constexpr int kScaleGroup = 32, kZeroShift = 7, kLargest = 241;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int, int i) {
        return lookup16(nibble_quad(tile + kTileQs, i), kLevels);
    }
#endif
};

}  // namespace
}  // namespace moesaic
