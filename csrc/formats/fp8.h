// FP8: blocks of e4m3 floats (1 sign, 4 exponent, 3 fraction bits, bias 7; no infinities, 0x7f and 0xff are NaN) under
// a float32 scale; value = float(q) * scale. Published scales per 128 x 128 block, per row or per tensor are repeated
// in every block that they cover. Not a ggml format: a number that no GGUF file has. Tiles hold pairs of k, [16
// rows][2].
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

inline float e4m3_to_float(uint8_t q) {
    if ((q & 0x7f) == 0x7f) return bits_to_float((q & 0x80u) << 24 | 0x7fc00000u);
    return half_to_float(static_cast<uint16_t>((q & 0x80) << 8 | (q & 0x7f) << 7)) * 0x1p8f;
}

template <int kSize>
struct E4M3Blocks {
    static constexpr int kBlock = kSize, kBlockBytes = kSize + 4;
    static constexpr bool kQuantized = false;  // float weights take float activations
    static constexpr Field kFields[] = {{0, kSize, 2}, {kSize, 4, 4}};

    static void dequantize(const uint8_t* block, float* y) {
        float scale;
        memcpy(&scale, block + kSize, sizeof(scale));
        for (int k = 0; k < kBlock; ++k) y[k] = e4m3_to_float(block[k]) * scale;
    }

#ifdef MOESAIC_ISA
    static constexpr int kStep = 4;
    // The reader of checkpoints refuses NaN codes; here they are as good as 480.
    MOESAIC_INLINE void load_weights(const uint8_t* p, vf (&w)[kStep]) { load_e4m3(p, w); }
    MOESAIC_INLINE vf load_scale(const uint8_t* tile) {
        return mul(load(reinterpret_cast<const float*>(tile + 16 * kSize)), set1(kE4m3Scale));
    }
#endif
};

struct FP8 : E4M3Blocks<128> {
    static constexpr const char* kName = "FP8";
    static constexpr int kGgmlType = 1000;
};

// For rows that 128 does not divide.
struct FP8_32 : E4M3Blocks<32> {
    static constexpr const char* kName = "FP8_32";
    static constexpr int kGgmlType = 1001;
};

}  // namespace
}  // namespace moesaic
