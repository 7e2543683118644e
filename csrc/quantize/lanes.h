// Sub-blocks side by side: the layout in which all scale searches run.
//
// A format's block is cut into sub-blocks of N weights that share a scale. L of them are handled at once, one per
// lane: every step is the same arithmetic on L independent lanes, which the compiler turns into vector code on any
// machine, and the result does not depend on the vector width (no sum is ever reordered). Knows no format.
#pragma once

#include <cmath>
#include <cstdint>

namespace moesaic::quantize {

template <int N, int L>
struct Group {
    float x[N][L];  // the weights, x[i][lane]
    float w[N][L];  // importance of each weight's squared error, >= 0
};

// Ranges below this hold only zeros in every format (a float16 scale cannot be that small), and dividing by them could
// overflow.
inline constexpr float kSmallestRange = 1e-20F;

// To nearest, ties to even, for |v| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Vectorises without SSE4.
inline float round_small(float v) {
    constexpr float kMagic = 12582912.0F;
    return (v + kMagic) - kMagic;
}

inline float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

// 1 / v, or 0 where v is too small to hold anything but zeros.
inline float reciprocal(float v) { return std::fabs(v) > kSmallestRange ? 1.0F / v : 0.0F; }

// Copies `count` consecutive sub-blocks (the rest of the lanes become zeros) and their importance (1 if none given).
template <int N, int L>
void gather(const float* x, const float* importance, int count, Group<N, L>& g) {
    for (int l = 0; l < L; ++l) {
        for (int i = 0; i < N; ++i) {
            g.x[i][l] = l < count ? x[l * N + i] : 0.0F;
            g.w[i][l] = l < count && importance != nullptr ? importance[l * N + i] : 1.0F;
        }
    }
}

template <int L>
float sum(const float (&lanes)[L]) {
    float total = 0.0F;
    for (int l = 0; l < L; ++l) total += lanes[l];
    return total;
}

}  // namespace moesaic::quantize
