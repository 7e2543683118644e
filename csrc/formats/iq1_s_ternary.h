// IQ1_S held as digits to the base 3: blocks of 256 weights, 58 bytes: qs[52] (ternary.h), scales[4] (a nibble for 32
// weights: the sign of delta, a scale of 3), d; value = d (2 scale + 1) (weight (+-) 1 / 8).
#pragma once

#include "formats/iq1_s.h"
#include "formats/ternary.h"

namespace moesaic {
namespace {

#ifdef MOESAIC_ISA
// What a nibble of scales means, but for d.
struct TernaryNibbles {
    float scale[16], scale_over_256[16], offset[16];
};
constexpr TernaryNibbles ternary_nibbles() {
    TernaryNibbles table{};
    for (int nibble = 0; nibble < 16; ++nibble) {
        const float scale = static_cast<float>(nibble | 1);
        table.scale[nibble] = scale / (1 << kRaisedDigit);
        table.scale_over_256[nibble] = scale / 256;
        table.offset[nibble] = scale * (nibble % 2 == 0 ? -0.875f : -1.125f);
    }
    return table;
}
constexpr TernaryNibbles kTernaryNibbles = ternary_nibbles();
#endif

struct IQ1_S_TERNARY {
    using Source = IQ1_S;
    static constexpr const char* kName = "IQ1_S_TERNARY";
    static constexpr int kGgmlType = 1100, kBlock = 256, kBlockBytes = 58;
    static constexpr bool kQuantized = true;
    static constexpr int kQs = 0, kScales = 52, kD = 56;
    static constexpr Field kFields[] = {{kQs, 52, 4}, {kScales, 4, 4}, {kD, 2, 2}};

    static void recode(const uint8_t* source, uint8_t* block) {
        int indices[32];
        for (int t = 0; t < 32; ++t) {
            const int high = load_u16(source + IQ1_S::kQh + t / 4 * 2);
            indices[t] = source[IQ1_S::kQs + t] | (high >> (t % 4 * 3) & 7) << 8;
        }
        ternary_bytes(indices, block + kQs);
        for (int g = 0; g < 8; g += 2) {
            const int first = load_u16(source + IQ1_S::kQh + 2 * g) >> 12;
            const int second = load_u16(source + IQ1_S::kQh + 2 * g + 2) >> 12;
            // In the file the sign is above the scale.
            const int nibbles[2] = {(first << 1 & 14) | first >> 3, (second << 1 & 14) | second >> 3};
            block[kScales + g / 2] = static_cast<uint8_t>(nibbles[0] | nibbles[1] << 4);
        }
        memcpy(block + kD, source + IQ1_S::kD, 2);
    }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int t = 0; t < 32; ++t) {
            const int nibble = block[kScales + t / 8] >> (t / 4 % 2 * 4) & 15;
            const float step = d * static_cast<float>(nibble | 1), delta = (nibble & 1) == 0 ? 0.125f : -0.125f;
            ternary_weights(step, block + kQs, 8 * t, delta, y + 8 * t);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScales = 832, kTileD = 896;
    static constexpr int kScaleGroup = 32, kZeroShift = kRaisedDigit;
    static constexpr int kLargest = 3 << kRaisedDigit;  // digits and 1
    static constexpr bool kHasOffset = true;
    struct Scales {
        vf d;
        vb nibbles;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)), load_b(tile + kTileScales)};
    }
    MOESAIC_INLINE vb nibble(const Scales& s, int j) { return shr_32(s.nibbles, 4 * j); }
    MOESAIC_INLINE vf scale(const Scales& s, int j) {
        return mul(s.d, lookup_floats(nibble(s, j), kTernaryNibbles.scale));
    }
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        return mul(s.d, lookup_floats(nibble(s, j), kTernaryNibbles.offset));
    }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        ternary_group<kRaisedDigit>(tile + kTileQs, g, quads);
    }
    // Sums are 256 times what they are with quads, the scale a 256th: the result is the same to the bit.
    template <class Group>
        requires(kHasByteDots)
    MOESAIC_INLINE vf plus_group(const uint8_t* tile, const Scales& s, int g, const Group& x, vf sum) {
        TernaryWalk walk = walk_group(tile + kTileQs, g);
        TernarySums sums{zero_i(), zero_i()};
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) add_quad(sums, walk, x.values + 4 * i);
        const vf scale_over_256 = mul(s.d, lookup_floats(nibble(s, g), kTernaryNibbles.scale_over_256));
        sum = fma(mul(digits_times_256(sums), scale_over_256), set1(x.scale), sum);
        return fma(offset(s, g), set1(x.scaled_sum), sum);
    }
#endif
};

}  // namespace
}  // namespace moesaic
