// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL: blocks of 32 weights with float16 scales of their own. Eight blocks are
// searched at once.
#include "quantize/affine.h"
#include "quantize/blocks.h"
#include "quantize/half.h"
#include "quantize/scale.h"

namespace moesaic::quantize {
namespace {

constexpr int kBlock = 32;
constexpr int kLanes = 8;
using Blocks = Group<kBlock, kLanes>;

// Levels of one block, already unsigned.
using Levels = std::uint8_t[kBlock];

int blocks_left(std::int64_t num_blocks, std::int64_t first) {
    return static_cast<int>(num_blocks - first < kLanes ? num_blocks - first : kLanes);
}

void load(const float* x, const float* importance, std::int64_t first, int count, Blocks& g) {
    const std::int64_t offset = first * kBlock;
    gather(x + offset, importance == nullptr ? nullptr : importance + offset, count, g);
}

// Weight i and weight i + 16 share a byte.
void pack_nibbles(const Levels& q, std::uint8_t* out) {
    for (int i = 0; i < kBlock / 2; ++i) {
        out[i] = static_cast<std::uint8_t>((q[i] & 15) | ((q[i + kBlock / 2] & 15) << 4));
    }
}

// Bit i of the 32-bit word is the fifth bit of weight i.
void pack_fifth_bits(const Levels& q, std::uint8_t* out) {
    for (int byte = 0; byte < 4; ++byte) {
        unsigned bits = 0;
        for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(q[8 * byte + i] >> 4) << i;
        out[byte] = static_cast<std::uint8_t>(bits);
    }
}

// One scale a block; `store(block index, scale, levels)` writes a block.
template <class Grid, class Store>
void quantize_scaled(const float* x, const float* importance, std::int64_t cols, const ScaleSearch<Grid>& search,
                     Store store) {
    const std::int64_t num_blocks = cols / kBlock;
    Blocks g;
    for (std::int64_t first = 0; first < num_blocks; first += kLanes) {
        const int count = blocks_left(num_blocks, first);
        load(x, importance, first, count, g);
        const ScaleFit<kLanes> fit = fit_scale(g, search);
        for (int l = 0; l < count; ++l) {
            const float d = round_to_half(fit.scale[l]);
            const float inverse = reciprocal(d);
            Levels q;
            for (int i = 0; i < kBlock; ++i) q[i] = search.grid.code(search.grid.nearest(g.x[i][l] * inverse));
            store(first + l, d, q);
        }
    }
}

// A scale and an offset a block, levels 0..max_q.
template <class Store>
void quantize_affine(const float* x, const float* importance, std::int64_t cols, float max_q, Store store) {
    const AffineSearch search{.max_q = max_q,
                              .offset_at_most_zero = false,
                              .first = -1.5F,
                              .step = 0.25F,
                              .num_steps = 11,
                              .num_refinements = 2};
    const std::int64_t num_blocks = cols / kBlock;
    Blocks g;
    for (std::int64_t first = 0; first < num_blocks; first += kLanes) {
        const int count = blocks_left(num_blocks, first);
        load(x, importance, first, count, g);
        const AffineFit<kLanes> fit = fit_affine(g, search);
        for (int l = 0; l < count; ++l) {
            const float d = round_to_half(fit.scale[l]);
            const float m = round_to_half(fit.offset[l]);
            const float inverse = reciprocal(d);
            Levels q;
            for (int i = 0; i < kBlock; ++i) {
                q[i] = static_cast<std::uint8_t>(round_small(clamp((g.x[i][l] - m) * inverse, 0.0F, max_q)));
            }
            store(first + l, d, m, q);
        }
    }
}

constexpr ScaleSearch<UniformGrid> kFourBits{
    .grid = {8.0F}, .first = -1.0F, .step = 0.25F, .num_steps = 9, .num_refinements = 2};
constexpr ScaleSearch<UniformGrid> kFiveBits{
    .grid = {16.0F}, .first = -1.0F, .step = 0.25F, .num_steps = 9, .num_refinements = 2};
constexpr ScaleSearch<NonlinearGrid> kNonlinear{
    .grid = {}, .first = -9.0F, .step = 3.0F, .num_steps = 7, .num_refinements = 2};

}  // namespace

// d:f16 qs:16
void quantize_q4_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_scaled(x, importance, cols, kFourBits, [out](std::int64_t block, float d, const Levels& q) {
        std::uint8_t* at = out + block * 18;
        store_half(d, at);
        pack_nibbles(q, at + 2);
    });
}

// d:f16 m:f16 qs:16
void quantize_q4_1(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_affine(x, importance, cols, 15.0F, [out](std::int64_t block, float d, float m, const Levels& q) {
        std::uint8_t* at = out + block * 20;
        store_half(d, at);
        store_half(m, at + 2);
        pack_nibbles(q, at + 4);
    });
}

// d:f16 qh:4 qs:16
void quantize_q5_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_scaled(x, importance, cols, kFiveBits, [out](std::int64_t block, float d, const Levels& q) {
        std::uint8_t* at = out + block * 22;
        store_half(d, at);
        pack_fifth_bits(q, at + 2);
        pack_nibbles(q, at + 6);
    });
}

// d:f16 m:f16 qh:4 qs:16
void quantize_q5_1(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_affine(x, importance, cols, 31.0F, [out](std::int64_t block, float d, float m, const Levels& q) {
        std::uint8_t* at = out + block * 24;
        store_half(d, at);
        store_half(m, at + 2);
        pack_fifth_bits(q, at + 4);
        pack_nibbles(q, at + 8);
    });
}

// d:f16 qs:32 signed. At 8 bits a search gains nothing that float16 rounding of d does not lose again: the largest
// weight takes level 127. Level -128 is never used, as kernels may negate.
void quantize_q8_0(const float* x, const float* /*importance*/, std::int64_t cols, std::uint8_t* out) {
    constexpr float kMaxLevel = 127.0F;
    for (std::int64_t block = 0; block < cols / kBlock; ++block) {
        const float* v = x + block * kBlock;
        float largest = 0.0F;
        for (int i = 0; i < kBlock; ++i) largest = std::fabs(v[i]) > largest ? std::fabs(v[i]) : largest;
        const float d = round_to_half(largest / kMaxLevel);
        const float inverse = reciprocal(d);
        std::uint8_t* at = out + block * 34;
        store_half(d, at);
        for (int i = 0; i < kBlock; ++i) {
            const float q = round_small(clamp(v[i] * inverse, -kMaxLevel, kMaxLevel));
            at[2 + i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(q));
        }
    }
}

// d:f16 qs:16
void quantize_iq4_nl(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    quantize_scaled(x, importance, cols, kNonlinear, [out](std::int64_t block, float d, const Levels& q) {
        std::uint8_t* at = out + block * 18;
        store_half(d, at);
        pack_nibbles(q, at + 2);
    });
}

}  // namespace moesaic::quantize
