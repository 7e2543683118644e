// IQ1_M held as digits to the base 3: blocks of 256 weights, 64 bytes: qs[52] (ternary.h), deltas[4] (a bit for 8
// weights: delta is negative), scales[8] as in IQ1_M; value = d (2 scale + 1) (weight (+-) 1 / 8).
#pragma once

#include "formats/iq1_m.h"
#include "formats/ternary.h"

namespace moesaic {
namespace {

struct IQ1_M_TERNARY {
    using Source = IQ1_M;
    static constexpr const char* kName = "IQ1_M_TERNARY";
    static constexpr int kGgmlType = 1101, kBlock = 256, kBlockBytes = 64;
    static constexpr bool kQuantized = true;
    static constexpr int kQs = 0, kDeltas = 52, kScales = 56;
    static constexpr Field kFields[] = {{kQs, 52, 4}, {kDeltas, 4, 1}, {kScales, 8, 4}};

    static void recode(const uint8_t* source, uint8_t* block) {
        int indices[32];
        memset(block + kDeltas, 0, 4);
        for (int t = 0; t < 32; ++t) {
            const int high = source[IQ1_M::kQh + t / 2] >> (t % 2 * 4) & 15;
            indices[t] = source[IQ1_M::kQs + t] | (high & 7) << 8;
            block[kDeltas + t / 8] = static_cast<uint8_t>(block[kDeltas + t / 8] | high >> 3 << (t % 8));
        }
        ternary_bytes(indices, block + kQs);
        memcpy(block + kScales, source + IQ1_M::kScales, 8);
    }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = IQ1_M::d_of(block + kScales);
        for (int t = 0; t < 32; ++t) {
            const float step = d * static_cast<float>(IQ1_M::odd_scale_of(block + kScales, t / 2));
            const bool negative = (block[kDeltas + t / 8] >> (t % 8) & 1) != 0;
            ternary_weights(step, block + kQs, 8 * t, negative ? -0.125f : 0.125f, y + 8 * t);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileDeltas = 832, kTileScales = 896;
    static constexpr int kScaleGroup = 16, kQuarter = kFullRangeBias == 0 ? 16 : 1;  // of a digit
    static constexpr int kZeroShift = kQuarter == 16 ? 6 : 2, kLargest = 12 * kQuarter;
    static constexpr bool kHasOffset = true;
    using Scales = IQ1_M::Scales;  // of a quarter of d / kQuarter
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s = IQ1_M::scales_of_tile(tile + kTileScales);
        s.quarter_d = mul(s.quarter_d, set1(1.0f / kQuarter));
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return IQ1_M::scale(s, j); }
    // Bytes are 4 digits and 4, one less where delta is negative: without the 4, the offset is scale (-4 + 1 / 2).
    MOESAIC_INLINE vf offset(const Scales& s, int j) { return mul(scale(s, j), set1(-3.5f * kQuarter)); }
    // A byte for 64 weights, in every byte of a row.
    MOESAIC_INLINE vb deltas(const uint8_t* tile, int g) { return spread_u8(tile + kTileDeltas + g / 2 * 16); }
    // `bit` where bit t of a byte is one.
    template <int bit>
    MOESAIC_INLINE vb delta_bit(vb deltas, int t) {
        constexpr int kTo = bit == 64 ? 6 : bit == 16 ? 4 : 0;
        return and_b(t < kTo ? shl_16(deltas, kTo - t) : shr_16(deltas, t - kTo), set1_b(bit));
    }
    MOESAIC_INLINE void group(const uint8_t* tile, const Scales&, int g, vb (&quads)[8]) {
        ternary_group<kZeroShift>(tile + kTileQs, g, quads);
        const vb negative = deltas(tile, g);
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) {
            quads[i] = sub_b(quads[i], delta_bit<kQuarter>(negative, g % 2 * 4 + i / 2));
        }
    }
    // Sums are 64 times what they are with quads, their unit a 64th: the result is the same to the bit.
    template <class Group>
        requires(kHasByteDots)
    MOESAIC_INLINE vf plus_group(const uint8_t* tile, const Scales& s, int g, const Group& x, vf sum) {
        TernaryWalk walk = walk_group(tile + kTileQs, g);
        const vb negative = deltas(tile, g);
        alignas(32) int32_t quarters[2][4];
        sums_of_eights(x.values, quarters);
        MOESAIC_UNROLL
        for (int h = 0; h < 2; ++h) {
            // A quarter less where delta is negative.
            TernarySums sums{zero_i(), lookup_4(shr_32(negative, g % 2 * 4 + 2 * h), quarters[h])};
            MOESAIC_UNROLL
            for (int i = 4 * h; i < 4 * h + 4; ++i) add_quad(sums, walk, x.values + 4 * i);
            const vf unit = mul(mul(s.quarter_d, set1(kQuarter * 0x1p-6f)), IQ1_M::odd_scale(s, 2 * g + h));
            sum = fma(mul(digits_times_256(sums), unit), set1(x.scale), sum);
            sum = fma(mul(unit, set1(-3.5f * 64)), set1(x.scaled_half_sums[h]), sum);
        }
        return sum;
    }
#endif
};

}  // namespace
}  // namespace moesaic
