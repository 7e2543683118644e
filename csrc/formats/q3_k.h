// Q3_K: blocks of 256 weights, 110 bytes: hmask[32] (third bits), qs[64] (two bits), scales[12] (16 scales of 6 bits
// less 32), d; value = d scale (q - 4) (ggml's block_q3_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q3_K {
    static constexpr const char* kName = "Q3_K";
    static constexpr int kGgmlType = 11, kBlock = 256, kBlockBytes = 110;
    static constexpr bool kQuantized = true;
    static constexpr int kHmask = 0, kQs = 32, kScales = 96, kD = 108;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kHmask, 32, 4}, {kScales, 12, 1}, {kD, 2, 2}};

    // Scale j: its low nibble from bytes 0-7 (low nibbles first), its upper two bits from bytes 8-11.
    static int scale_of(const uint8_t* packed, int j) {
        const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
        return (low | (packed[8 + j % 4] >> (j / 4 * 2) & 3) << 4) - 32;
    }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) {
            const int low = block[kQs + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            const int high = block[kHmask + k % 32] >> (k / 32) & 1;
            y[k] = d * static_cast<float>(scale_of(block + kScales, k / 16)) * static_cast<float>(low + 4 * high - 4);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileHmask = 1024, kTileScales = 1536, kTileD = 1728;
    static constexpr int kScaleGroup = 16, kZeroShift = 2, kLargest = 7;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf quarter_d;
        alignas(64) uint8_t by_4[256];  // signed bytes: four times (six bits less 32)
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.quarter_d = mul(load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)), set1(0.25f));
        const vb high = load_b(tile + kTileScales + 128);
        const vb low4 = set1_b(0x3c), top2 = set1_b(0xc0), less_32 = set1_b(0x80);
        for (int i = 0; i < 2; ++i) {
            const vb low = load_b(tile + kTileScales + 64 * i);
            const vb first = or_b(and_b(shl_16(low, 2), low4), and_b(shl_16(high, 6 - 2 * i), top2));
            const vb second = or_b(and_b(shr_16(low, 2), low4), and_b(shl_16(high, 2 - 2 * i), top2));
            store_b(s.by_4 + 64 * i, xor_b(first, less_32));
            store_b(s.by_4 + 64 * i + 128, xor_b(second, less_32));
        }
        leave_in_memory(s.by_4);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.quarter_d, to_float(load_i8(s.by_4 + 16 * j))); }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        const vb low = and_b(shr_16(load_b(tile + kTileQs + 64 * (g / 4 * 8 + i)), g % 4 * 2), set1_b(3));
        const vb mask = load_b(tile + kTileHmask + 64 * i);
        return or_b(low, and_b(g < 2 ? shl_16(mask, 2 - g) : shr_16(mask, g - 2), set1_b(4)));
    }
    // Two bits where they are, or one further down, and the third above them.
    static constexpr int raise(int g) { return g % 4 < 3 ? g % 4 * 2 : 5; }
    MOESAIC_INLINE vb raised_quad(const uint8_t* tile, const Scales&, int g, int i) {
        const int raised = raise(g), up = raised + 2 - g;
        const vb low = load_b(tile + kTileQs + 64 * (g / 4 * 8 + i)), mask = load_b(tile + kTileHmask + 64 * i);
        return or_b(and_b(shr_16(low, g % 4 * 2 - raised), set1_b(static_cast<uint8_t>(3 << raised))),
                    and_b(up > 0 ? shl_16(mask, up) : shr_16(mask, -up), set1_b(static_cast<uint8_t>(4 << raised))));
    }
    MOESAIC_INLINE vf raised_scale(const Scales& s, int g, int h) {
        const vf d = mul(s.quarter_d, set1(1.0f / static_cast<float>(1 << raise(g))));
        return mul(d, to_float(load_i8(s.by_4 + 16 * (2 * g + h))));
    }
#endif
};

}  // namespace
}  // namespace moesaic
