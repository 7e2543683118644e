// MXFP4: blocks of 32 E2M1 floats with a power of two as scale (OCP Microscaling Formats specification 1.0, 2023).
#include <bit>

#include "quantize/blocks.h"
#include "quantize/lanes.h"

namespace moesaic::quantize {
namespace {

constexpr int kBlock = 32;
constexpr int kBlockBytes = 17;
// Twice the magnitudes of E2M1, as ggml counts them; the code of a negative weight is 8 more.
constexpr float kLevels[8] = {0, 1, 2, 3, 4, 6, 8, 12};

// 2^(exponent - 128): what a level is multiplied with, half of the E8M0 scale because levels count twice.
float scale_of(int exponent) {
    const auto e = static_cast<std::uint32_t>(exponent);
    return std::bit_cast<float>(exponent < 2 ? 0x00200000U << e : (e - 1U) << 23);
}

int code_of(float magnitude) {
    int code = 0;
    for (int j = 1; j < 8; ++j) code += magnitude > 0.5F * (kLevels[j - 1] + kLevels[j]) ? 1 : 0;
    return code;
}

float error_of(const float* x, const float* importance, int exponent) {
    const float scale = scale_of(exponent);
    float error = 0.0F;
    for (int i = 0; i < kBlock; ++i) {
        const float magnitude = std::fabs(x[i]);
        const float e = scale * kLevels[code_of(magnitude / scale)] - magnitude;
        error += (importance == nullptr ? 1.0F : importance[i]) * e * e;
    }
    return error;
}

// The exponent with the least error among those that put the largest weight near the largest level.
int best_exponent(const float* x, const float* importance) {
    float largest = 0.0F;
    for (int i = 0; i < kBlock; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    const int usual = (std::bit_cast<std::int32_t>(largest) >> 23) - 2;  // floor(log2) - 2, with E8M0's bias
    int best = usual < 1 ? 0 : usual;
    float best_error = INFINITY;
    for (int exponent = usual - 1; exponent <= usual + 1; ++exponent) {
        if (exponent < 0) continue;
        const float error = error_of(x, importance, exponent);
        if (error < best_error) {
            best_error = error;
            best = exponent;
        }
    }
    return best;
}

}  // namespace

// e:1 qs:16; weights i and i + 16 share a byte
void quantize_mxfp4(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    for (std::int64_t block = 0; block < cols / kBlock; ++block) {
        const float* v = x + block * kBlock;
        const int exponent = best_exponent(v, importance == nullptr ? nullptr : importance + block * kBlock);
        const float scale = scale_of(exponent);
        std::uint8_t* at = out + block * kBlockBytes;
        at[0] = static_cast<std::uint8_t>(exponent);
        for (int i = 0; i < kBlock / 2; ++i) {
            const float low = v[i], high = v[i + kBlock / 2];
            const int low_code = code_of(std::fabs(low) / scale) | (low < 0.0F ? 8 : 0);
            const int high_code = code_of(std::fabs(high) / scale) | (high < 0.0F ? 8 : 0);
            at[1 + i] = static_cast<std::uint8_t>(low_code | (high_code << 4));
        }
    }
}

}  // namespace moesaic::quantize
