// TQ1_0: blocks of 256 weights, 54 bytes: qs[48] (five ternary digits a byte: weights 0-159 in bytes 0-31, 160-239 in
// bytes 32-47), qh[4] (four digits: weights 240-255), d; value = d (digit - 1) (ggml's block_tq1_0). A byte is a
// fraction of 256; digit n is the integer part of three times it, after n multiplications by three.
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

// The digits of each byte: four of them, two bits each from the lowest on, and the fifth.
struct TernaryDigits {
    uint8_t first[256], fifth[256];
};
constexpr TernaryDigits ternary_digits() {
    TernaryDigits digits{};
    for (int byte = 0; byte < 256; ++byte) {
        int fraction = byte, first = 0;
        for (int n = 0; n < 4; ++n) {
            first |= fraction * 3 >> 8 << (2 * n);
            fraction = fraction * 3 & 255;
        }
        digits.first[byte] = static_cast<uint8_t>(first);
        digits.fifth[byte] = static_cast<uint8_t>(fraction * 3 >> 8);
    }
    return digits;
}

struct TQ1_0 {
    static constexpr const char* kName = "TQ1_0";
    static constexpr int kGgmlType = 34, kBlock = 256, kBlockBytes = 54;
    static constexpr bool kQuantized = true;
    static constexpr int kQs = 0, kQh = 48, kD = 52;
    static constexpr Field kFields[] = {{kQs, 52, 4}, {kD, 2, 2}};  // with qh
    static constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};

    static int digit(uint8_t byte, int n) { return static_cast<uint8_t>(byte * kPowers[n]) * 3 >> 8; }

    static void dequantize(const uint8_t* block, float* y) {
        const float d = load_half(block + kD);
        for (int k = 0; k < kBlock; ++k) {
            const int q = k < 160   ? digit(block[kQs + k % 32], k / 32)
                          : k < 240 ? digit(block[kQs + 32 + k % 16], (k - 160) / 16)
                                    : digit(block[kQh + k % 4], (k - 240) / 4);
            y[k] = d * static_cast<float>(q - 1);
        }
    }

#ifdef MOESAIC_ISA
    static constexpr int kTileQs = 0, kTileD = 832;
    static constexpr int kScaleGroup = 32, kZeroShift = 0, kLargest = 2;
    static constexpr bool kHasOffset = false;
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr TernaryDigits kDigits = ternary_digits();
    MOESAIC_INLINE vb digits(vb bytes, int n) {
        return n == 4 ? lookup256(bytes, kDigits.fifth)
                      : and_b(shr_16(lookup256(bytes, kDigits.first), 2 * n), set1_b(3));
    }
#else
    MOESAIC_INLINE vb digits_of_upper(vb upper, int n) { return mul_high_16(mul_16(upper, kPowers[n]), 3); }
    // Digit n of each byte.
    MOESAIC_INLINE vb digits(vb bytes, int n) {
        const vb upper = and_b(bytes, set1_lane(0xff00ff00));
        return or_b(digits_of_upper(shl_16(bytes, 8), n), shl_16(digits_of_upper(upper, n), 8));
    }
#endif
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        const int k = 32 * g + 4 * i;
        const int four = k < 160 ? i : k < 240 ? 8 + i % 4 : 12;
        const int n = k < 160 ? g : k < 240 ? (k - 160) / 16 : i - 4;
        return digits(load_b(tile + kTileQs + 64 * four), n);
    }
#endif
};

}  // namespace
}  // namespace moesaic
