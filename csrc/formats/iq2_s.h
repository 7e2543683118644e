// IQ2_S: blocks of 256 weights, 82 bytes: d, qs[32] (8 low bits of an index for 8 weights), signs[32], qh[8] (2 high
// bits), scales[8] (4 bits for 16 weights); value = d (2 scale + 1) / 8 (+-)entry (ggml's block_iq2_s).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ2_S {
    static constexpr const char* kName = "IQ2_S";
    static constexpr int kGgmlType = 22, kBlock = 256, kBlockBytes = 82;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2, kSigns = 34, kQh = 66, kScales = 74;
    static constexpr Field kFields[] = {{kQs, 32, 4}, {kSigns, 32, 4}, {kQh, 8, 1}, {kScales, 8, 1}, {kD, 2, 2}};
    static constexpr const auto& kNumbers = kIq2SNumbers;

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int t = 0; t < 32; ++t) {
            const int scale = block[kScales + t / 4] >> (t / 2 % 2 * 4) & 15;
            const float step = d * (0.5f + static_cast<float>(scale)) * 0.25f;
            const int index = block[kQs + t] | (block[kQh + t / 4] >> (t % 4 * 2) & 3) << 8;
            signed_weights(step, kIq2SGrid.bytes[kNumbers.numbers[index]], 8, block[kSigns + t], y + 8 * t);
        }
    }

    // Tiles have numbers of our own for entries.
    static void to_tile(uint8_t* block) { renumber_entries<2>(block + kQs, block + kQh, kNumbers.numbers); }
    static void from_tile(uint8_t* block) { renumber_entries<2>(block + kQs, block + kQh, kNumbers.places); }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileSigns = 512, kTileQh = 1024, kTileScales = 1152, kTileD = 1280;
    static constexpr int kScaleGroup = 16, kZeroShift = 6, kLargest = 107;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf eighth_d;
        alignas(64) uint8_t odd[2][128];  // scale j is odd[j % 2][16 (j / 2)] on
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.eighth_d = mul(load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)), set1(0.125f));
        for (int i = 0; i < 128; i += 64) odd_scales(tile + kTileScales + i, s.odd[0] + i, s.odd[1] + i);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) {
        return mul(s.eighth_d, to_float(load_u8(s.odd[j % 2] + j / 2 * 16)));
    }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb low = load_b(tile + kTileQs + 64 * g), high = spread_u8(tile + kTileQh + 16 * g);
        const vb first = set1_lane(0x00000300), second = set1_lane(0x03000000);
        const vb even = or_b(and_b(high, first), and_b(shr_16(high, 4), second));
        const vb odd = or_b(and_b(shr_16(high, 2), first), and_b(shr_16(high, 6), second));
        lookup8_signed(kIq2SGrid, or_b(and_b(low, set1_lane(0x00ff00ff)), even), or_b(shr_16(low, 8), odd),
                       load_b(tile + kTileSigns + 64 * g), quads);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr const int (&kQuadOrder)[8] = kOrderOfTurnedHalves;
    MOESAIC_INLINE void mixed_group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb low = load_b(tile + kTileQs + 64 * g), high = spread_u8(tile + kTileQh + 16 * g);
        const vb signs = load_b(tile + kTileSigns + 64 * g);
        vb halves[2];
        lookup_halves(kIq2SGrid.halves, entry_numbers(low, high, 0x40100401, 0x80200802), halves);
        quads_by_sixteens(kIq2SGrid, halves, signs, quads);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
