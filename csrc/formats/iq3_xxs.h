// IQ3_XXS: blocks of 256 weights, 98 bytes: d, qs[64] (an index for 4 weights), 8 words (for 32 weights: four codes of
// 7 bits for their signs and a scale of 4); value = d (2 scale + 1) / 4 (+-)entry (ggml's block_iq3_xxs).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ3_XXS {
    static constexpr const char* kName = "IQ3_XXS";
    static constexpr int kGgmlType = 18, kBlock = 256, kBlockBytes = 98;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2, kWords = 66;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kWords, 32, 4}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int g = 0; g < 8; ++g) {
            const uint32_t word = load_u32(block + kWords + 4 * g);
            const float step = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
            for (int i = 0; i < 8; ++i) {
                const int signs = signs_of_code(word >> (i / 2 * 7) & 127u) >> (i % 2 * 4);
                signed_weights(step, kIq3XxsGrid.bytes[block[kQs + 8 * g + i]], 4, signs, y + 32 * g + 4 * i);
            }
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileWords = 1024, kTileD = 1536;
    static constexpr int kScaleGroup = 32, kZeroShift = 6, kLargest = 126;
    static constexpr bool kHasOffset = false;
    struct Scales {
        Factor quarter_d;
        const uint8_t* words;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        const vf d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        return {factor(mul(d, set1(0.25f))), tile + kTileWords};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return times_odd_on_top(load_b(s.words + 64 * j), s.quarter_d); }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales& s, int g, vb (&quads)[8]) {
        const vb signs = signs_of_codes(load_b(s.words + 64 * g)), even = set1_lane(0x00ff00ff);
        const vb a = load_b(tile + kTileQs + 128 * g), b = load_b(tile + kTileQs + 128 * g + 64);
        lookup4_signed<0>(kIq3XxsGrid, and_b(a, even), shr_16(a, 8), signs, quads);
        lookup4_signed<1>(kIq3XxsGrid, and_b(b, even), shr_16(b, 8), signs, quads);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr int kQuadOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    MOESAIC_INLINE void mixed_group(const uint8_t* tile, const Scales& s, int g, vb (&quads)[8]) {
        const vb signs = signs_of_sevens(bits_from<0, 7, 14, 21>(load_b(s.words + 64 * g)));
        vb halves[2];
        lookup_halves(kIq3XxsGrid.halves, entry_numbers(load_b(tile + kTileQs + 128 * g)), halves);
        signed_quads(kIq3XxsGrid, halves, bits_from<-2, 2, 6, 10>(signs), quads);
        lookup_halves(kIq3XxsGrid.halves, entry_numbers(load_b(tile + kTileQs + 128 * g + 64)), halves);
        signed_quads(kIq3XxsGrid, halves, bits_from<14, 18, 22, 26>(signs), quads + 4);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
