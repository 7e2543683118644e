// INT4 and UINT4: groups of 32, 64 or 128 weights of 4 bits under a float16 or bfloat16 scale, as compressed-tensors,
// GPTQ and AWQ checkpoints hold them; value = (q - 8) * scale, or (q - z) * scale with a zero point z of its own. Not
// ggml formats: numbers that no GGUF file has. Byte b of a block has weights 2 b and 2 b + 1, as it is published; a
// tile has them as Q4_0 does.
#pragma once

#include "formats/nibbles.h"

namespace moesaic {
namespace {

enum class HalfScale { kF16, kBF16 };

template <int kGroup, HalfScale kScaleType, bool kHasZeroPoint>
struct GroupedNibbles {
    static constexpr int kBlock = kGroup, kQsBytes = kGroup / 2, kBlockBytes = kQsBytes + 2 + (kHasZeroPoint ? 1 : 0);
    static constexpr bool kQuantized = true;
    static constexpr int kD = kQsBytes, kZ = kD + 2;
    // Without a zero point the last field is empty.
    static constexpr Field kFields[] = {{0, kQsBytes, 4, false, true}, {kD, 2, 2}, {kZ, kHasZeroPoint ? 1 : 0, 1}};

    static void dequantize(const uint8_t* block, float* y) {
        const uint16_t bits = load_u16(block + kD);
        const float d = kScaleType == HalfScale::kF16 ? half_to_float(bits) : bits_to_float(uint32_t{bits} << 16);
        const int zero = kHasZeroPoint ? block[kZ] : 8;
        for (int k = 0; k < kBlock; ++k) {
            y[k] = static_cast<float>((block[k / 2] >> 4 * (k % 2) & 15) - zero) * d;
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileD = 16 * kD, kTileZ = 16 * kZ;
    static constexpr int kScaleGroup = 32, kZeroShift = kHasZeroPoint ? -1 : 3, kLargest = 15;
    static constexpr int kGroupPeriod = kBlock < 64 ? 1 : 2;
    static constexpr bool kHasOffset = kHasZeroPoint, kHasWideScales = kScaleType == HalfScale::kBF16;
    struct Scales {
        vf d, offset;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        const auto* p = reinterpret_cast<const uint16_t*>(tile + kTileD);
        Scales s;
        s.d = kScaleType == HalfScale::kF16 ? load_f16(p) : load_bf16(p);
        if constexpr (kHasZeroPoint) {
            s.offset = mul(s.d, sub(set1(0.0f), to_float(load_u8(tile + kTileZ))));
        } else {
            s.offset = set1(0.0f);
        }
        return s;
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
    MOESAIC_INLINE vf offset(const Scales& s, int) { return s.offset; }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) { return nibble_quad(tile + 256 * g, i); }
#endif
};

#define MOESAIC_GROUPED_NIBBLES(Name, id, group, scale, has_zero_point)        \
    struct Name : GroupedNibbles<group, HalfScale::k##scale, has_zero_point> { \
        static constexpr const char* kName = #Name;                            \
        static constexpr int kGgmlType = id;                                   \
    };
MOESAIC_GROUPED_NIBBLES(INT4_32_F16, 1010, 32, F16, false)
MOESAIC_GROUPED_NIBBLES(INT4_64_F16, 1011, 64, F16, false)
MOESAIC_GROUPED_NIBBLES(INT4_128_F16, 1012, 128, F16, false)
MOESAIC_GROUPED_NIBBLES(INT4_32_BF16, 1013, 32, BF16, false)
MOESAIC_GROUPED_NIBBLES(INT4_64_BF16, 1014, 64, BF16, false)
MOESAIC_GROUPED_NIBBLES(INT4_128_BF16, 1015, 128, BF16, false)
MOESAIC_GROUPED_NIBBLES(UINT4_32_F16, 1016, 32, F16, true)
MOESAIC_GROUPED_NIBBLES(UINT4_64_F16, 1017, 64, F16, true)
MOESAIC_GROUPED_NIBBLES(UINT4_128_F16, 1018, 128, F16, true)
MOESAIC_GROUPED_NIBBLES(UINT4_32_BF16, 1019, 32, BF16, true)
MOESAIC_GROUPED_NIBBLES(UINT4_64_BF16, 1020, 64, BF16, true)
MOESAIC_GROUPED_NIBBLES(UINT4_128_BF16, 1021, 128, BF16, true)
#undef MOESAIC_GROUPED_NIBBLES

}  // namespace
}  // namespace moesaic
