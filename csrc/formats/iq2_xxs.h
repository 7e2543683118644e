// IQ2_XXS: blocks of 256 weights, 66 bytes: d, then for 32 weights four indices of 8 bits and a word with four codes of
// 7 bits for their signs and a scale of 4; value = d (2 scale + 1) / 8 (+-)entry (ggml's block_iq2_xxs).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ2_XXS {
    static constexpr const char* kName = "IQ2_XXS";
    static constexpr int kGgmlType = 16, kBlock = 256, kBlockBytes = 66;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int g = 0; g < 8; ++g) {
            const uint8_t* indices = block + kQs + 8 * g;
            const uint32_t word = load_u32(indices + 4);
            const float step = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
            for (int t = 0; t < 4; ++t) {
                const int signs = signs_of_code(word >> (7 * t) & 127u);
                signed_weights(step, kIq2XxsGrid.bytes[indices[t]], 8, signs, y + 32 * g + 8 * t);
            }
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 1024;
    static constexpr int kScaleGroup = 32, kZeroShift = 6, kLargest = 107;
    static constexpr bool kHasOffset = false;
    struct Scales {
        Factor eighth_d;
        const uint8_t* words;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        const vf d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        return {factor(mul(d, set1(0.125f))), tile + kTileQs + 64};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return times_odd_on_top(load_b(s.words + 128 * j), s.eighth_d); }
    MOESAIC_INLINE void group(const uint8_t*, const Scales& s, int g, vb (&quads)[8]) {
        const vb indices = load_b(s.words + 128 * g - 64), signs = signs_of_codes(load_b(s.words + 128 * g));
        lookup8_signed(kIq2XxsGrid, and_b(indices, set1_lane(0x00ff00ff)), shr_16(indices, 8), signs, quads);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr int kQuadOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    MOESAIC_INLINE void mixed_group(const uint8_t*, const Scales& s, int g, vb (&quads)[8]) {
        vb halves[2];
        lookup_halves(kIq2XxsGrid.halves, entry_numbers(load_b(s.words + 128 * g - 64)), halves);
        const vb signs = signs_of_sevens(bits_from<0, 7, 14, 21>(load_b(s.words + 128 * g)));
        signed_quads(kIq2XxsGrid, halves[0], shl_16(signs, 2), quads);
        signed_quads(kIq2XxsGrid, halves[1], shr_16(signs, 2), quads + 4);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
