// Q2_K: blocks of 256 weights, 84 bytes: scales[16] (scale and minimum of 16 weights, 4 bits each), qs[64], d, dmin;
// value = d scale q - dmin minimum (ggml's block_q2_K).
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

struct Q2_K {
    static constexpr const char* kName = "Q2_K";
    static constexpr int kGgmlType = 10, kBlock = 256, kBlockBytes = 84;
    static constexpr bool kQuantized = true;
    static constexpr int kScales = 0, kQs = 16, kD = 80, kDmin = 82;
    static constexpr Field kFields[] = {{kQs, 64, 4}, {kScales, 16, 1}, {kD, 2, 2}, {kDmin, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD), dmin = load_half(block + kDmin);
        for (int k = 0; k < kBlock; ++k) {
            const uint8_t packed = block[kScales + k / 16];
            const int q = block[kQs + k / 128 * 32 + k % 32] >> (k / 32 % 4 * 2) & 3;
            y[k] = d * static_cast<float>(packed & 15) * static_cast<float>(q) - dmin * static_cast<float>(packed >> 4);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileScales = 1024, kTileD = 1280, kTileDmin = 1312;
    static constexpr int kScaleGroup = 16, kZeroShift = -1, kLargest = TwoBits::kLargest;
    static constexpr int kGroupPeriod = 4;
    static constexpr int largest(int g) { return TwoBits::largest(g % 4); }  // byte of group g
    static constexpr bool kHasOffset = true;
    struct Scales {
        Factor d[4], negated_dmin;  // d for groups g % 4; of minima in the upper nibbles of bytes
        const uint8_t* packed;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        const vf d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        const vf dmin = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileDmin));
        for (int i = 0; i < 4; ++i) s.d[i] = factor(mul(d, set1(TwoBits::unit(i))));
        s.negated_dmin = factor(mul(dmin, set1(-0x1p-4f)));
        s.packed = tile + kTileScales;
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int j) {
        return times_bits(load_u8(s.packed + 16 * j), 0x0f, s.d[j / 2 % 4]);
    }
    MOESAIC_INLINE vf offset(const Scales& s, int j) {
        return times_bits(load_u8(s.packed + 16 * j), 0xf0, s.negated_dmin);
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return TwoBits::of(load_b(tile + kTileQs + 64 * (g / 4 * 8 + i)), g % 4);
    }
#endif
};

}  // namespace
}  // namespace moesaic
