// IQ3_S: blocks of 256 weights, 110 bytes: d, qs[64] (8 low bits of an index for 4 weights), qh[8] (the ninth),
// signs[32], scales[4] (4 bits for 32 weights); value = d (2 scale + 1) (+-)entry (ggml's block_iq3_s).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ3_S {
    static constexpr const char* kName = "IQ3_S";
    static constexpr int kGgmlType = 21, kBlock = 256, kBlockBytes = 110;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2, kQh = 66, kSigns = 74, kScales = 106;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kSigns, 32, 4}, {kQh, 8, 1}, {kScales, 4, 1}, {kD, 2, 2}};
    static constexpr const auto& kNumbers = kIq3SNumbers;

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int i = 0; i < 64; ++i) {
            const float step = d * static_cast<float>(1 + 2 * (block[kScales + i / 16] >> (i / 8 % 2 * 4) & 15));
            const int index = block[kQs + i] | (block[kQh + i / 8] >> i % 8 & 1) << 8;
            const int signs = block[kSigns + i / 2] >> (i % 2 * 4);
            signed_weights(step, kIq3SGrid.bytes[kNumbers.numbers[index]], 4, signs, y + 4 * i);
        }
    }

    // Tiles have numbers of our own for entries.
    static void to_tile(uint8_t* block) { renumber_entries<1>(block + kQs, block + kQh, kNumbers.numbers); }
    static void from_tile(uint8_t* block) { renumber_entries<1>(block + kQs, block + kQh, kNumbers.places); }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileSigns = 1024, kTileQh = 1536, kTileScales = 1664, kTileD = 1728;
    static constexpr int kScaleGroup = 32, kZeroShift = 6, kLargest = 79;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
        alignas(64) uint8_t odd[2][64];  // scale j is odd[j % 2][16 (j / 2)] on
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        odd_scales(tile + kTileScales, s.odd[0], s.odd[1]);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.d, to_float(load_u8(s.odd[j % 2] + j / 2 * 16))); }
    template <int u>
    MOESAIC_INLINE void half_group(const uint8_t* qs, vb high, vb signs, vb (&quads)[8]) {
        const vb low = load_b(qs + 64 * u), first = set1_lane(0x00000100), second = set1_lane(0x01000000);
        const vb even = or_b(and_b(shr_16(high, 4 * u), first), and_b(shr_16(high, 4 * u + 2), second));
        const vb odd = or_b(and_b(shr_16(high, 4 * u + 1), first), and_b(shr_16(high, 4 * u + 3), second));
        lookup4_signed<u>(kIq3SGrid, or_b(and_b(low, set1_lane(0x00ff00ff)), even), or_b(shr_16(low, 8), odd), signs,
                          quads);
    }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb high = spread_u8(tile + kTileQh + 16 * g), signs = load_b(tile + kTileSigns + 64 * g);
        half_group<0>(tile + kTileQs + 128 * g, high, signs, quads);
        half_group<1>(tile + kTileQs + 128 * g, high, signs, quads);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr int kQuadOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    MOESAIC_INLINE void mixed_group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb high = spread_u8(tile + kTileQh + 16 * g), signs = load_b(tile + kTileSigns + 64 * g);
        const uint8_t* qs = tile + kTileQs + 128 * g;
        vb halves[2];
        lookup_halves(kIq3SGrid.halves, entry_numbers(load_b(qs), high, 0x08040201), halves);
        signed_quads(kIq3SGrid, halves, bits_from<-2, 2, 6, 10>(signs), quads);
        lookup_halves(kIq3SGrid.halves, entry_numbers(load_b(qs + 64), high, 0x80402010), halves);
        signed_quads(kIq3SGrid, halves, bits_from<14, 18, 22, 26>(signs), quads + 4);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
