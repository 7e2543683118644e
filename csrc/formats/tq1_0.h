// TQ1_0: blocks of 256 weights, 54 bytes: qs[48] (five ternary digits a byte: weights 0-159 in bytes 0-31, 160-239 in
// bytes 32-47), qh[4] (four digits: weights 240-255), d; value = d (digit - 1) (ggml's block_tq1_0). A byte is a
// fraction of 256; digit n is the integer part of three times it, after n multiplications by three.
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

// The digits of each byte: four of them, two bits each from the lowest on, and the fifth.
struct TernaryDigits {
    alignas(64) uint8_t tables[2][4][64];
};
constexpr TernaryDigits ternary_digits() {
    TernaryDigits digits{};
    for (int byte = 0; byte < 256; ++byte) {
        int fraction = byte, first = 0;
        for (int n = 0; n < 4; ++n) {
            first |= fraction * 3 >> 8 << (2 * n);
            fraction = fraction * 3 & 255;
        }
        digits.tables[0][byte / 64][byte % 64] = static_cast<uint8_t>(first);
        digits.tables[1][byte / 64][byte % 64] = static_cast<uint8_t>(fraction * 3 >> 8);
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
    // Of the vectors and digits, those of quad i of group g.
    static constexpr int four_of(int g, int i) { return g < 5 ? i : g == 7 && i >= 4 ? 12 : 8 + i % 4; }
    static constexpr int digit_of(int g, int i) { return g < 5 ? g : g == 7 && i >= 4 ? i - 4 : 2 * (g - 5) + i / 4; }
#ifdef MOESAIC_HAS_BYTE_TABLES
    static constexpr TernaryDigits kDigits = ternary_digits();
    struct Scales {
        vf d;
        alignas(64) uint8_t first[13 * 64], fifth[13 * 64];
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        Scales s;
        s.d = load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD));
        MOESAIC_UNROLL
        for (int i = 0; i < 13 * 64; i += 64) {
            vb digits[2];
            lookup256(load_b(tile + kTileQs + i), kDigits.tables, digits);
            store_b(s.first + i, digits[0]);
            store_b(s.fifth + i, digits[1]);
        }
        leave_in_memory(s.first);
        leave_in_memory(s.fifth);
        return s;
    }
    MOESAIC_INLINE vb digits(const Scales& s, int four, int n) {
        return n == 4 ? load_b(s.fifth + 64 * four) : and_b(shr_16(load_b(s.first + 64 * four), 2 * n), set1_b(3));
    }
    MOESAIC_INLINE void group(const uint8_t*, const Scales& s, int g, vb (&quads)[8]) {
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) quads[i] = digits(s, four_of(g, i), digit_of(g, i));
    }
    // Digits 0 to 3 of a vector are each a group's, and may stay where they are.
    static constexpr int raise(int g) { return g < 4 ? 2 * g : 0; }
    MOESAIC_INLINE vb raised_quad(const uint8_t*, const Scales& s, int g, int i) {
        if (raise(g) == 0) return digits(s, four_of(g, i), digit_of(g, i));
        return and_b(load_b(s.first + 64 * i), set1_b(static_cast<uint8_t>(3 << raise(g))));
    }
    MOESAIC_INLINE vf raised_scale(const Scales& s, int g, int) {
        return mul(s.d, set1(1.0f / static_cast<float>(1 << raise(g))));
    }
#else
    struct Scales {
        vf d;
    };
    MOESAIC_INLINE Scales load_scales(const uint8_t* tile) {
        return {load_f16(reinterpret_cast<const uint16_t*>(tile + kTileD))};
    }
    MOESAIC_INLINE vb digits_of_upper(vb upper, int n) { return mul_high_16(mul_16(upper, kPowers[n]), 3); }
    // Digit n of each byte.
    MOESAIC_INLINE vb digits(vb bytes, int n) {
        const vb upper = and_b(bytes, set1_lane(0xff00ff00));
        return or_b(digits_of_upper(shl_16(bytes, 8), n), shl_16(digits_of_upper(upper, n), 8));
    }
    MOESAIC_INLINE vb quad(const uint8_t* tile, int g, int i) {
        return digits(load_b(tile + kTileQs + 64 * four_of(g, i)), digit_of(g, i));
    }
#endif
    MOESAIC_INLINE vf scale(const Scales& s, int) { return s.d; }
#endif
};

}  // namespace
}  // namespace moesaic
