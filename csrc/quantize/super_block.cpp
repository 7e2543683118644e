// Q2_K - Q6_K and IQ4_XS: super-blocks of 256 weights whose sub-blocks hold integer scales (and minima).
#include <cstring>

#include "quantize/affine.h"
#include "quantize/blocks.h"
#include "quantize/half.h"
#include "quantize/scale.h"

namespace moesaic::quantize {
namespace {

constexpr int kSuperBlock = 256;
// Of improving factors and integers in turn: two gain 0.4 to 0.6% of the error, more below 0.1%. Without minima, where
// integers alone follow the rounded factor, they gain nothing.
constexpr int kNumRounds = 2;

using Levels = std::uint8_t[kSuperBlock];  // in the order of the weights, unsigned

const float* advance(const float* importance, std::int64_t offset) {
    return importance == nullptr ? nullptr : importance + offset;
}

template <int N, int L, class Code>
void to_levels(const float (&q)[N][L], Code code, Levels& levels) {
    for (int l = 0; l < L; ++l) {
        for (int i = 0; i < N; ++i) levels[l * N + i] = code(q[i][l]);
    }
}

// Calls store(block index, fitted super-block, levels) for each super-block of a row with minima.
template <int N, class Store>
void quantize_with_minima(const float* x, const float* importance, std::int64_t cols, const AffineSearch& search,
                          float max_scale, Store store) {
    constexpr int kLanes = kSuperBlock / N;
    Group<N, kLanes> g;
    float q[N][kLanes];
    Levels levels;
    for (std::int64_t block = 0; block < cols / kSuperBlock; ++block) {
        const std::int64_t offset = block * kSuperBlock;
        gather(x + offset, advance(importance, offset), kLanes, g);
        const auto fitted = fit_affine_super_block(g, search, max_scale, kNumRounds);
        fitted.assign(g, search.max_q, q);
        to_levels(q, [](float level) { return static_cast<std::uint8_t>(level); }, levels);
        store(block, fitted, levels);
    }
}

// The same without minima.
template <int N, class Grid, class Store>
void quantize_without_minima(const float* x, const float* importance, std::int64_t cols,
                             const ScaleSearch<Grid>& search, float max_scale, Store store) {
    constexpr int kLanes = kSuperBlock / N;
    Group<N, kLanes> g;
    float q[N][kLanes];
    Levels levels;
    for (std::int64_t block = 0; block < cols / kSuperBlock; ++block) {
        const std::int64_t offset = block * kSuperBlock;
        gather(x + offset, advance(importance, offset), kLanes, g);
        const auto fitted = fit_scaled_super_block(g, search, max_scale);
        fitted.assign(g, q);
        to_levels(q, [&](float level) { return search.grid.code(level); }, levels);
        store(block, fitted, levels);
    }
}

// Two bits a weight: each run of 128 weights fills 32 bytes, weights 32 apart share a byte.
void pack_two_bits(const Levels& q, std::uint8_t* out) {
    for (int run = 0; run < 2; ++run) {
        for (int i = 0; i < 32; ++i) {
            unsigned byte = 0;
            for (int k = 0; k < 4; ++k) byte |= (q[run * 128 + k * 32 + i] & 3U) << (2 * k);
            out[run * 32 + i] = static_cast<std::uint8_t>(byte);
        }
    }
}

// Bit `bit` of every weight: bit k of out[i] belongs to weight 32 k + i.
void pack_one_bit(const Levels& q, int bit, std::uint8_t* out) {
    for (int i = 0; i < 32; ++i) {
        unsigned byte = 0;
        for (int k = 0; k < 8; ++k) byte |= ((q[k * 32 + i] >> bit) & 1U) << k;
        out[i] = static_cast<std::uint8_t>(byte);
    }
}

// Low four bits: each run of 2 * stride weights fills `stride` bytes, weights `stride` apart share a byte.
void pack_four_bits(const Levels& q, int stride, std::uint8_t* out) {
    for (int byte = 0; byte < kSuperBlock / 2; ++byte) {
        const int weight = byte / stride * 2 * stride + byte % stride;
        out[byte] = static_cast<std::uint8_t>((q[weight] & 15) | ((q[weight + stride] & 15) << 4));
    }
}

// Eight 6-bit scales and eight 6-bit minima in 12 bytes: the upper two bits of pairs 4-7 ride on the bytes of 0-3.
void pack_six_bit_pairs(const float (&scale)[8], const float (&min)[8], std::uint8_t* out) {
    for (int j = 0; j < 4; ++j) {
        const auto s = static_cast<unsigned>(scale[j]), s_far = static_cast<unsigned>(scale[j + 4]);
        const auto m = static_cast<unsigned>(min[j]), m_far = static_cast<unsigned>(min[j + 4]);
        out[j] = static_cast<std::uint8_t>(s | ((s_far >> 4) << 6));
        out[j + 4] = static_cast<std::uint8_t>(m | ((m_far >> 4) << 6));
        out[j + 8] = static_cast<std::uint8_t>((s_far & 15U) | ((m_far & 15U) << 4));
    }
}

// Sixteen 6-bit scales in 12 bytes: low nibbles of j and j + 8 share byte j, upper bits of j fill byte 8 + j % 4.
void pack_six_bit_scales(const float (&scale)[16], std::uint8_t* out) {
    std::memset(out, 0, 12);
    for (int j = 0; j < 16; ++j) {
        const auto s = static_cast<unsigned>(scale[j] + 32.0F);
        out[j % 8] = static_cast<std::uint8_t>(out[j % 8] | ((s & 15U) << (j / 8 * 4)));
        out[8 + j % 4] = static_cast<std::uint8_t>(out[8 + j % 4] | ((s >> 4) << (j / 4 * 2)));
    }
}

// Candidates widen the range of levels by a fraction of a level on either side; few levels want finer steps.
constexpr AffineSearch kTwoBits{
    .max_q = 3.0F, .offset_at_most_zero = true, .first = -0.9F, .step = 0.15F, .num_steps = 13, .num_refinements = 2};
constexpr AffineSearch kFourBits{
    .max_q = 15.0F, .offset_at_most_zero = true, .first = -1.5F, .step = 0.25F, .num_steps = 11, .num_refinements = 2};
constexpr AffineSearch kFiveBits{
    .max_q = 31.0F, .offset_at_most_zero = true, .first = -2.0F, .step = 0.4F, .num_steps = 9, .num_refinements = 2};
constexpr ScaleSearch<UniformGrid> kThreeBits{
    .grid = {4.0F}, .first = -1.0F, .step = 0.2F, .num_steps = 9, .num_refinements = 2};
constexpr ScaleSearch<UniformGrid> kSixBits{
    .grid = {32.0F}, .first = -2.0F, .step = 0.4F, .num_steps = 9, .num_refinements = 2};
constexpr ScaleSearch<NonlinearGrid> kNonlinear{
    .grid = {}, .first = -9.0F, .step = 3.0F, .num_steps = 7, .num_refinements = 2};

}  // namespace

// scales:16 (scale | min << 4) qs:64 d:f16 dmin:f16
void quantize_q2_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_with_minima<16>(
        x, importance, cols, kTwoBits, 15.0F, [out](std::int64_t block, const auto& fitted, const Levels& q) {
            std::uint8_t* at = out + block * 84;
            for (int j = 0; j < 16; ++j) {
                const auto scale = static_cast<unsigned>(fitted.scale[j]), min = static_cast<unsigned>(fitted.min[j]);
                at[j] = static_cast<std::uint8_t>(scale | (min << 4));
            }
            pack_two_bits(q, at + 16);
            store_half(fitted.d, at + 80);
            store_half(fitted.dmin, at + 82);
        });
}

// hmask:32 qs:64 scales:12 d:f16
void quantize_q3_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_without_minima<16>(x, importance, cols, kThreeBits, 32.0F,
                                [out](std::int64_t block, const auto& fitted, const Levels& q) {
                                    std::uint8_t* at = out + block * 110;
                                    pack_one_bit(q, 2, at);
                                    pack_two_bits(q, at + 32);
                                    pack_six_bit_scales(fitted.scale, at + 96);
                                    store_half(fitted.d, at + 108);
                                });
}

// d:f16 dmin:f16 scales:12 qs:128
void quantize_q4_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_with_minima<32>(x, importance, cols, kFourBits, 63.0F,
                             [out](std::int64_t block, const auto& fitted, const Levels& q) {
                                 std::uint8_t* at = out + block * 144;
                                 store_half(fitted.d, at);
                                 store_half(fitted.dmin, at + 2);
                                 pack_six_bit_pairs(fitted.scale, fitted.min, at + 4);
                                 pack_four_bits(q, 32, at + 16);
                             });
}

// d:f16 dmin:f16 scales:12 qh:32 qs:128
void quantize_q5_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_with_minima<32>(x, importance, cols, kFiveBits, 63.0F,
                             [out](std::int64_t block, const auto& fitted, const Levels& q) {
                                 std::uint8_t* at = out + block * 176;
                                 store_half(fitted.d, at);
                                 store_half(fitted.dmin, at + 2);
                                 pack_six_bit_pairs(fitted.scale, fitted.min, at + 4);
                                 pack_one_bit(q, 4, at + 16);
                                 pack_four_bits(q, 32, at + 48);
                             });
}

// ql:128 qh:64 scales:16 signed d:f16
void quantize_q6_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_without_minima<16>(
        x, importance, cols, kSixBits, 128.0F, [out](std::int64_t block, const auto& fitted, const Levels& q) {
            std::uint8_t* at = out + block * 210;
            Levels upper;
            for (int i = 0; i < kSuperBlock; ++i) upper[i] = q[i] >> 4;
            pack_four_bits(q, 64, at);
            pack_two_bits(upper, at + 128);
            for (int j = 0; j < 16; ++j) {
                at[192 + j] = static_cast<std::uint8_t>(static_cast<std::int8_t>(fitted.scale[j]));
            }
            store_half(fitted.d, at + 208);
        });
}

// d:f16 scales_h:u16 scales_l:4 qs:128; a sub-block's weights i and i + 16 share a byte
void quantize_iq4_xs(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_without_minima<32>(x, importance, cols, kNonlinear, 32.0F,
                                [out](std::int64_t block, const auto& fitted, const Levels& q) {
                                    std::uint8_t* at = out + block * 136;
                                    store_half(fitted.d, at);
                                    std::memset(at + 2, 0, 6);
                                    for (int j = 0; j < 8; ++j) {
                                        const auto s = static_cast<unsigned>(fitted.scale[j] + 32.0F);
                                        std::uint8_t& high = at[2 + j / 4];
                                        std::uint8_t& low = at[4 + j / 2];
                                        high = static_cast<std::uint8_t>(high | ((s >> 4) << (2 * (j % 4))));
                                        low = static_cast<std::uint8_t>(low | ((s & 15U) << (4 * (j % 2))));
                                    }
                                    pack_four_bits(q, 16, at + 8);
                                });
}

}  // namespace moesaic::quantize
