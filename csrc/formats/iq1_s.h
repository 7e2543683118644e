// IQ1_S: blocks of 256 weights, 50 bytes: d, qs[32] (8 low bits of an index for 8 weights), qh[8] (16 bits for 32
// weights: four times 3 high bits, a scale of 3, the sign of delta); value = d (2 scale + 1) (entry (+-) 1 / 8) (ggml's
// block_iq1_s).
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

struct IQ1_S {
    static constexpr const char* kName = "IQ1_S";
    static constexpr int kGgmlType = 19, kBlock = 256, kBlockBytes = 50;
    static constexpr bool kQuantized = true;
    static constexpr int kD = 0, kQs = 2, kQh = 34;
    static constexpr Field kFields[] = {{kQs, 32, 4}, {kQh, 16, 2}, {kD, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int t = 0; t < 32; ++t) {
            const int high = load_u16(block + kQh + t / 4 * 2);
            const float step = d * static_cast<float>(2 * (high >> 12 & 7) + 1);
            const int index = block[kQs + t] | (high >> (t % 4 * 3) & 7) << 8;
            ternary_weights(step, kIq1Grid.bytes[index], (high & 0x8000) == 0 ? 0.125f : -0.125f, y + 8 * t);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileQh = 512, kTileD = 768;
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = 9;
    static constexpr bool kHasOffset = true;
    struct Scales {
        vf quarter_d;
        const uint8_t* high;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        const vf d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        return {mul(d, set1(0.25f)), tile + kTileQh};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) {
        const vb odd = or_b(and_b(shr_32(spread_u16(s.high + 32 * j), 27), set1_lane(14)), set1_lane(1));
        return mul(s.quarter_d, to_float(as_int(odd)));
    }
    // Bytes are 5 + 4 entries: the offset is scale (-5 (+-) 1 / 2).
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        const vb nine_or_eleven = or_b(and_b(shr_32(spread_u16(s.high + 32 * j), 30), set1_lane(2)), set1_lane(9));
        return mul(mul(scale(s, j), set1(-0.5f)), to_float(as_int(nine_or_eleven)));
    }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales& s, int g, vb (&quads)[8]) {
        const vb low = load_b(tile + kTileQs + 64 * g), high = spread_u16(s.high + 32 * g);
        const vb first = set1_lane(0x00000700), second = set1_lane(0x07000000);
        const vb even = or_b(and_b(shl_16(high, 8), first), and_b(shl_16(high, 2), second));
        const vb odd = or_b(and_b(shl_16(high, 5), first), and_b(shr_16(high, 1), second));
        lookup_ternary(or_b(and_b(low, set1_lane(0x00ff00ff)), even), or_b(shr_16(low, 8), odd), quads);
    }
#endif
};

}  // namespace
}  // namespace moesaic
