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

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int t = 0; t < 32; ++t) {
            const int scale = block[kScales + t / 4] >> (t / 2 % 2 * 4) & 15;
            const float step = d * (0.5f + static_cast<float>(scale)) * 0.25f;
            const uint32_t packed = load_u16(block + kQs + 2 * t);
            signed_weights(step, kIq2XsGrid.bytes[kIq2XsNumbers.numbers[packed & 511u]], 8, signs_of_code(packed >> 9),
                           y + 8 * t);
        }
    }

    // Tiles have other numbers for entries than blocks.
    static constexpr const auto& kNumbers = kIq2XsNumbers;
    template <class Map>
    static void renumber(uint8_t* block, const Map& to) {
        for (uint8_t* p = block + kQs; p < block + kQs + 64; p += 2) {
            const int packed = load_u16(p), number = to[packed & 511];
            p[0] = static_cast<uint8_t>(number);
            p[1] = static_cast<uint8_t>((packed >> 8 & 254) | number >> 8);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScales = 1024, kTileD = 1152;
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
        const vb a = load_b(tile + kTileQs + 128 * g), b = load_b(tile + kTileQs + 128 * g + 64);
        // Bytes 0 and 2 of a lane for the two entries of a, 1 and 3 for those of b; quads in the same order.
        const vb signs = with_parity(or_b(shr_16(a, 9), and_b(shr_16(b, 1), set1_lane(0x7f007f00))));
        const vb index = set1_lane(0x01ff01ff);
        vb mixed[8];
        lookup8_signed(kIq2XsGrid, and_b(a, index), and_b(b, index), signs, mixed);
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) quads[i] = mixed[i / 2 == 1 ? i + 2 : i / 2 == 2 ? i - 2 : i];
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    // Bytes 0 and 2 of a lane are for the two entries of a, 1 and 3 for those of b. The second half, turned by a byte,
    // has those of a where the first has those of b: each half of the group gets quads of its own.
    static constexpr int kQuadOrder[8] = {0, 1, 2, 3, 7, 4, 5, 6};
    MOESAIC_INLINE void mixed_group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb a = load_b(tile + kTileQs + 128 * g), b = load_b(tile + kTileQs + 128 * g + 64);
        const vb low = select_b(0x00ff00ff, a, shl_16(b, 8)), high = select_b(0x00ff00ff, shr_16(a, 8), b);
        vb halves[2];
        lookup_halves(kIq2XsGrid.halves, entry_numbers(low, high, 0x01010101), halves);
        const vb turned = rotate_32<8>(halves[1]), signs = signs_of<1>(high);
        signed_quads(kIq2XsGrid, select_b(0x00ff00ff, halves[0], turned), bits_from<-2, 2, 14, 18>(signs), quads);
        signed_quads(kIq2XsGrid, select_b(0x00ff00ff, turned, halves[0]), bits_from<26, 6, 10, 22>(signs), quads + 4);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
