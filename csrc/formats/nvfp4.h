// NVFP4: blocks of 64 weights, 36 bytes: d[4] (unsigned E4M3, one for 16 weights), qs[32]; value = d / 2 levels[q], the
// levels of MXFP4, q of 4 bits (ggml's block_nvfp4).
#pragma once

#include "formats/mxfp4.h"

namespace moesaic {
namespace {

struct NVFP4 {
    static constexpr const char* kName = "NVFP4";
    static constexpr int kGgmlType = 40, kBlock = 64, kBlockBytes = 36;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 4;
    static constexpr Field kFields[] = {{kQs, 32, 4}, {kD, 4, 1}};

    // The half-precision number 2^-8 d. The bias of E4M3 is 7, that of half precision 15. 0x7f (NaN) counts as zero.
    static uint16_t half_of(uint8_t d) { return static_cast<uint16_t>(d == 0x7f ? 0 : (d & 0x7f) << 7); }

    static void dequantize(const uint8_t* block, float* y) {
        for (int s = 0; s < 4; ++s) {
            const float step = half_to_float(half_of(block[kD + s])) * 128.0f;
            for (int k = 0; k < 16; ++k) {
                const int q = block[kQs + 8 * s + k % 8] >> (k / 8 * 4) & 15;
                y[16 * s + k] = step * static_cast<float>(MXFP4::kLevels[q] - 16);
            }
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 512;
    static constexpr int kScaleGroup = 16, kZeroShift = 4, kLargest = 28;
    static constexpr bool kHasOffset = false;
    struct Scales {
        alignas(64) uint16_t halves[64];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        for (int i = 0; i < 64; ++i) s.halves[i] = half_of(tile[kTileD + i]);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(load_f16(s.halves + 16 * j), set1(128.0f)); }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        const vb both = load_b(tile + kTileQs + 256 * g + i / 4 * 128 + i % 2 * 64);
        return lookup16(i % 4 < 2 ? low_nibbles(both) : high_nibbles(both), MXFP4::kLevels);
    }
#endif
};

}  // namespace
}  // namespace moesaic
