// IQ1_S held as ternary digits: blocks of 256 weights, 58 bytes: qs[52] (ternary.h), scales[4] (a nibble for 32
// weights: the sign of delta, a scale of 3), d; value = d (2 scale + 1) (weight (+-) 1 / 8).
#pragma once

#include "formats/iq1_s.h"
#include "formats/ternary_tiles.h"

namespace moesaic {
namespace {

#ifdef MOESAIC_ISA
// What a nibble of scales means: for codes of weights, raised by 2 n bits, and for what codes have too much.
struct TernaryNibbles {
    float scale[4][16], offset[16];
};
constexpr TernaryNibbles ternary_nibbles() {
    TernaryNibbles table{};
    for (int nibble = 0; nibble < 16; ++nibble) {
        const float scale = static_cast<float>(nibble | 1);
        for (int n = 0; n < 4; ++n) table.scale[n][nibble] = scale / static_cast<float>(1 << (2 * n));
        table.offset[nibble] = scale * (nibble % 2 == 0 ? -1.875f : -2.125f);
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
    static constexpr int kScaleGroup = 32, kZeroShift = -1, kLargest = 3;
    // Scales are small integers (and offsets eighths), whose products with sums are exact; d comes last.
    static constexpr bool kHasOffset = true, kHasBlockFactor = true;
    struct Scales {
        vf d;
        vb nibbles;
        TernaryCodes codes;
    };
    MOESAIC_INLINE vf load_d(const uint8_t* tile) { return load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD)); }
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = load_d(tile);
        s.nibbles = load_b(tile + kTileScales);
        take_codes(tile + kTileQs, s.codes);
        return s;
    }
    MOESAIC_INLINE vf block_factor(const Scales& s) { return s.d; }
    MOESAIC_INLINE vf looked_up(const Scales& s, int j, const float (&table)[16]) {
        return lookup_floats(shr_32(s.nibbles, 4 * j), table);
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) { return looked_up(s, j, kTernaryNibbles.scale[0]); }
    MOESAIC_INLINE vf offset(const Scales& s, int j) { return looked_up(s, j, kTernaryNibbles.offset); }
    MOESAIC_INLINE vb quad(const uint8_t*, const Scales& s, int g, int i) { return ternary_quad(s.codes, g, i); }
    static constexpr int raise(int g) { return ternary_raise(g); }
    MOESAIC_INLINE vb raised_quad(const uint8_t*, const Scales& s, int g, int i) {
        return raised_ternary_quad(s.codes, g, i);
    }
    MOESAIC_INLINE vf raised_scale(const Scales& s, int g, int) {
        return looked_up(s, g, kTernaryNibbles.scale[raise(g) / 2]);
    }
#ifdef MOESAIC_HAS_BYTE_TABLES
    // Nibbles of group g in the lowest bits of lanes: where bytes end, a load from there on spares a shift.
    MOESAIC_INLINE vb nibbles_at(const uint8_t* tile, int g) {
        const vb bytes = load_b(tile + kTileScales + g / 2);
        return g % 2 == 0 ? bytes : shr_32(bytes, 4);
    }
    // Groups first to first + 3, whose sums of raised codes are there.
    template <class Group>
    MOESAIC_INLINE vf plus_groups(const uint8_t* tile, int first, const Group* x, const vi (&sums)[8], vf of_block) {
        MOESAIC_UNROLL
        for (int g = first; g < first + 4; ++g) {
            const vb nibbles = nibbles_at(tile, g);
            const vf scale = lookup_floats(nibbles, kTernaryNibbles.scale[raise(g) / 2]);
            of_block = fma(mul(to_float(sums[g]), scale), set1(x[g].scale), of_block);
            of_block = fma(lookup_floats(nibbles, kTernaryNibbles.offset), set1(x[g].scaled_sum), of_block);
        }
        return of_block;
    }
    template <class Group>
    MOESAIC_INLINE vf plus_block(const uint8_t* tile, const uint8_t* ahead, const Group* x, vf sum) {
        vi sums[8];
        first_ternary_sums<1>(tile + kTileQs, ahead + kTileQs, x, sums);
        vf of_block = computed_here(plus_groups(tile, 0, x, sums, set1(0.0f)));
        other_ternary_sums<1>(tile + kTileQs, ahead + kTileQs, x, sums);
        prefetch(ahead + kTileScales);
        prefetch(ahead + kTileD);
        of_block = plus_groups(tile, 4, x, sums, of_block);
        return fma(of_block, load_d(tile), sum);
    }
#endif
#endif
};

}  // namespace
}  // namespace moesaic
