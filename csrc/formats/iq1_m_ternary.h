// IQ1_M held as ternary digits: blocks of 256 weights, 64 bytes: qs[52] (ternary.h), deltas[4] (a bit for 8
// weights: delta is negative), scales[8] as in IQ1_M; value = d (2 scale + 1) (weight (+-) 1 / 8).
#pragma once

#include "formats/iq1_m.h"
#include "formats/ternary_tiles.h"

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
    static constexpr int kScaleGroup = 16, kZeroShift = 4, kLargest = 25;  // eighths: of a code 8, and 1 more or less
    static constexpr bool kHasOffset = false;
    struct Scales {
        IQ1_M::Scales block;
        TernaryCodes codes;
    };
    // Scales of eighths of weights.
    MOESAIC_INLINE IQ1_M::Scales block_scales(const uint8_t* tile) {
        IQ1_M::Scales s = IQ1_M::scales_of_tile(tile + kTileScales);
        s.quarter_d = mul(s.quarter_d, set1(0.5f));
        return s;
    }
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.block = block_scales(tile);
        take_codes(tile + kTileQs, s.codes);
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return IQ1_M::scale(s.block, j); }
    // A byte for 64 weights, in every byte of a row.
    MOESAIC_INLINE vb deltas(const uint8_t* tile, int g) { return spread_u8(tile + kTileDeltas + g / 2 * 16); }
    // Twice bit t of each byte.
    MOESAIC_INLINE vb twice_bit(vb deltas, int t) {
        return and_b(t == 0 ? shl_16(deltas, 1) : shr_16(deltas, t - 1), set1_b(2));
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, const Scales& s, int g, int i) {
        const vb delta = sub_b(set1_b(1), twice_bit(deltas(tile, g), g % 2 * 4 + i / 2));
        return add_b(ternary_quad<3>(s.codes, g, i), delta);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    // Groups g and g + 1, whose sums of raised codes are there.
    template <class Group>
    MOESAIC_INLINE vf plus_groups(const uint8_t* tile, const IQ1_M::Scales& s, int g, const Group* x,
                                  const vi (&sums)[16], vf sum) {
        alignas(64) float less[4][4];  // of a half of 16 weights, by its two bits of delta, in eighths
        signed_eights(x[g].values, x[g + 1].values, -15, -17, less);
        const vb negative = deltas(tile, g);
        MOESAIC_UNROLL
        for (int h = 0; h < 4; ++h) {
            const int half = 2 * g + h;
            const vf too_much = lookup_4(shr_32(negative, 2 * h), less[h]);
            const float eighths = 8.0f / static_cast<float>(1 << ternary_raise(half / 2));
            const vf dots = fma(to_float(sums[half]), set1(eighths), too_much);
            sum = fma(mul(dots, IQ1_M::scale(s, half)), set1(x[half / 2].scale), sum);
        }
        return sum;
    }
    template <class Group>
    MOESAIC_INLINE vf plus_block(const uint8_t* tile, const uint8_t* ahead, const Group* x, vf sum) {
        vi sums[16];
        first_ternary_sums<2>(tile + kTileQs, ahead + kTileQs, x, sums);
        other_ternary_sums<2>(tile + kTileQs, ahead + kTileQs, x, sums);
        MOESAIC_UNROLL
        for (int i = kTileDeltas; i < 16 * kBlockBytes; i += 64) prefetch(ahead + i);
        const IQ1_M::Scales s = block_scales(tile);
        MOESAIC_UNROLL
        for (int g = 0; g < 8; g += 2) sum = plus_groups(tile, s, g, x, sums, sum);
        return sum;
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
