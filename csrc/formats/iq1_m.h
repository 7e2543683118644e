// IQ1_M: blocks of 256 weights, 56 bytes: qs[32] (8 low bits of an index for 8 weights), qh[16] (4 bits for 8 weights:
// 3 high bits, the sign of delta), scales[4] (16 bits: four scales of 3 for 16 weights, a quarter of the half-precision
// d); value = d (2 scale + 1) (entry (+-) 1 / 8) (ggml's block_iq1_m).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ1_M {
    static constexpr const char* kName = "IQ1_M";
    static constexpr int kGgmlType = 29, kBlock = 256, kBlockBytes = 56;
    static constexpr bool kQuantized = true;
    static constexpr int kQs = 0, kQh = 32, kScales = 48;
    static constexpr Field kFields[] = {{kQs, 32, 4}, {kQh, 16, 2}, {kScales, 8, 4}};

    static float d_of(const uint8_t* scales) {
        int bits = 0;
        for (int i = 0; i < 4; ++i) bits |= load_u16(scales + 2 * i) >> 12 << (4 * i);
        return half_to_float(static_cast<uint16_t>(bits));
    }
    // 2 scale + 1 of 16 weights.
    static int odd_scale_of(const uint8_t* scales, int j) {
        return (load_u16(scales + j / 4 * 2) >> (j % 4 * 3) & 7) * 2 + 1;
    }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = d_of(block + kScales);
        for (int t = 0; t < 32; ++t) {
            const int high = block[kQh + t / 2] >> (t % 2 * 4) & 15;
            const uint64_t entry = kIq1Grid.bytes[block[kQs + t] | (high & 7) << 8];
            ternary_weights(d * static_cast<float>(odd_scale_of(block + kScales, t / 2)), entry,
                            (high & 8) == 0 ? 0.125f : -0.125f, y + 8 * t);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileQh = 512, kTileScales = 768;
    static constexpr int kScaleGroup = 16, kZeroShift = -1, kLargest = 9;
    static constexpr bool kHasOffset = true;
    struct Scales {
        vf quarter_d;
        const uint8_t* scales;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) { return scales_of_tile(tile + kTileScales); }
    MOESAIC_INLINE Scales scales_of_tile(const uint8_t* scales) {
        const vb a = load_b(scales), b = load_b(scales + 64);
        const vb low = or_b(and_b(shr_32(a, 12), set1_lane(0x000f)), and_b(shr_32(a, 24), set1_lane(0x00f0)));
        const vb high = or_b(and_b(shr_32(b, 4), set1_lane(0x0f00)), and_b(shr_32(b, 16), set1_lane(0xf000)));
        alignas(64) uint32_t words[16];
        alignas(32) uint16_t halves[16];
        store_b(words, or_b(low, high));
        for (int row = 0; row < 16; ++row) halves[row] = static_cast<uint16_t>(words[row]);
        return {mul(load_f16(halves), set1(0.25f)), scales};
    }
    // 2 scale + 1, whatever the bit above the scale is.
    static constexpr float kOddScales[16] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};
    MOESAIC_INLINE vf odd_scale(const Scales& s, int j) {
        const vb scales = shr_32(load_b(s.scales + j / 8 * 64), j / 4 % 2 * 16 + j % 4 * 3);
        return lookup_floats(scales, kOddScales);
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return mul(s.quarter_d, odd_scale(s, j)); }
    // Bytes are 4 + 4 entries, and one more where delta is positive: the offset is scale (-4 - 1 / 2).
    MOESAIC_INLINE vf offset(const Scales& s, int j) { return mul(scale(s, j), set1(-4.5f)); }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        const vb low = load_b(tile + kTileQs + 64 * g), high = spread_u16(tile + kTileQh + 32 * g);
        const vb first = set1_lane(0x00000700), second = set1_lane(0x07000000), one = set1_b(1);
        const vb even = or_b(and_b(shl_16(high, 8), first), and_b(high, second));
        const vb odd = or_b(and_b(shl_16(high, 4), first), and_b(shr_16(high, 4), second));
        lookup_ternary(or_b(and_b(low, set1_lane(0x00ff00ff)), even), or_b(shr_16(low, 8), odd), quads);
        const vb halves[2] = {repeat_byte<0>(high), repeat_byte<1>(high)};
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) {
            const vb negative = and_b(shr_16(halves[i / 4], i / 2 % 2 == 0 ? 3 : 7), one);
            quads[i] = xor_b(quads[i], negative);
        }
    }
#endif
};

}  // namespace
}  // namespace moesaic
