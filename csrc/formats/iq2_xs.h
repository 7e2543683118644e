// IQ2_XS: blocks of 256 weights, 74 bytes: d, qs[32] (16 bits for 8 weights: an index of 9 and a code of 7 for their
// signs), scales[8] (4 bits for 16 weights); value = d (2 scale + 1) / 8 (+-)entry (ggml's block_iq2_xs).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ2_XS {
    static constexpr const char* kName = "IQ2_XS";
    static constexpr int kGgmlType = 17, kBlock = 256, kBlockBytes = 74;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2, kScales = 66;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kScales, 8, 1}, {kD, 2, 2}};
    static constexpr const auto& kNumbers = kIq2XsNumbers;

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int t = 0; t < 32; ++t) {
            const int scale = block[kScales + t / 4] >> (t / 2 % 2 * 4) & 15;
            const float step = d * (0.5f + static_cast<float>(scale)) * 0.25f;
            const uint32_t packed = load_u16(block + kQs + 2 * t);
            signed_weights(step, kIq2XsGrid.bytes[kNumbers.numbers[packed & 511u]], 8, signs_of_code(packed >> 9),
                           y + 8 * t);
        }
    }

    // Tiles have, in place of qs, the low bytes of 32 numbers of our own for entries, then their ninth bits, each under
    // a code of signs.
    static void to_tile(uint8_t* block) {
        uint8_t bytes[64];
        for (int t = 0; t < 32; ++t) {
            const int packed = load_u16(block + kQs + 2 * t), number = kNumbers.numbers[packed & 511];
            bytes[t] = static_cast<uint8_t>(number);
            bytes[32 + t] = static_cast<uint8_t>(packed >> 9 | number >> 8 << 7);
        }
        memcpy(block + kQs, bytes, 64);
    }
    static void from_tile(uint8_t* block) {
        uint8_t bytes[64];
        memcpy(bytes, block + kQs, 64);
        for (int t = 0; t < 32; ++t) {
            const int high = bytes[32 + t], place = kNumbers.places[bytes[t] | high >> 7 << 8];
            block[kQs + 2 * t] = static_cast<uint8_t>(place);
            block[kQs + 2 * t + 1] = static_cast<uint8_t>((high & 127) << 1 | place >> 8);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileLow = 0, kTileHigh = 512, kTileScales = 1024, kTileD = 1152;
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
        const vb low = load_b(tile + kTileLow + 64 * g), high = load_b(tile + kTileHigh + 64 * g);
        const vb ninth = set1_lane(0x01000100), low_byte = set1_lane(0x00ff00ff);
        const vb even = or_b(and_b(low, low_byte), and_b(shl_16(high, 1), ninth));
        const vb odd = or_b(and_b(shr_16(low, 8), low_byte), and_b(shr_16(high, 7), ninth));
        lookup8_signed(kIq2XsGrid, even, odd, with_parity(and_b(high, set1_b(127))), quads);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr const int (&kQuadOrder)[8] = kOrderOfTurnedHalves;
    MOESAIC_INLINE void mixed_group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb high = load_b(tile + kTileHigh + 64 * g);
        vb halves[2];
        lookup_halves(kIq2XsGrid.halves, entry_numbers(load_b(tile + kTileLow + 64 * g), high), halves);
        quads_by_sixteens(kIq2XsGrid, halves, signs_of_sevens(high), quads);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
