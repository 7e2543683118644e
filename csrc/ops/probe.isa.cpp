#include "ops/probe.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

constexpr int kChains = kHas32Registers ? 16 : 6;  // independent sums: more than latency times throughput needs

float sum(const float* p, int64_t n) {
    vf sums[8];
    for (vf& s : sums) s = set1(0.0f);
    for (int64_t i = 0; i < n; i += 128) {
        for (int j = 0; j < 8; ++j) sums[j] = add(sums[j], load(p + i + 16 * j));
    }
    for (int j = 1; j < 8; ++j) sums[0] = add(sums[0], sums[j]);
    return reduce_add(sums[0]);
}

int64_t multiply_add_f32(int64_t rounds, float* sink) {
    vf sums[kChains];
    for (int j = 0; j < kChains; ++j) sums[j] = set1(static_cast<float>(j));
    const vf factor = set1(sink[0]), term = set1(sink[1]);
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < kChains; ++j) sums[j] = fma(sums[j], factor, term);
    }
    for (int j = 1; j < kChains; ++j) sums[0] = add(sums[0], sums[j]);
    sink[2] = reduce_add(sums[0]);
    return rounds * kChains * 16 * 2;
}

int64_t dot_i8(int64_t rounds, float* sink) {
    vi sums[kChains];
    for (vi& s : sums) s = zero_i();
    int8_t four[4];
    __builtin_memcpy(four, sink, 4);
    uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>((four[0] + i) & 127);
    const vb weights = load_b(bytes);
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < kChains; ++j) {
            // Where dot4() is several instructions, those without the sum would be done once for all.
            const int8_t* x = kHas32Registers ? four : read_again<int8_t>(four);
            sums[j] = dot4<false>(sums[j], weights, x);
        }
    }
    for (int j = 1; j < kChains; ++j) sums[0] = add(sums[0], sums[j]);
    sink[2] = static_cast<float>(reduce_add(sums[0]));
    return rounds * kChains * 64 * 2;
}

#ifdef MOESAIC_HAS_TILES
// Two tiles of activations times two of weights, as the products of many tokens use them: four independent sums.
int64_t tile_bf16(int64_t rounds, float* sink) {
    alignas(64) uint16_t operand[kTileTokens * 32];
    alignas(64) float sums[kTileTokens * 16];
    uint32_t bits;
    __builtin_memcpy(&bits, sink, 4);
    for (uint16_t& value : operand) value = static_cast<uint16_t>(bits >> 16);
    configure_tiles(kTileTokens, kTileTokens);
    MOESAIC_TILE_ZERO(0);
    MOESAIC_TILE_ZERO(1);
    MOESAIC_TILE_ZERO(2);
    MOESAIC_TILE_ZERO(3);
    MOESAIC_TILE_LOAD(4, operand, 64);
    MOESAIC_TILE_LOAD(5, operand, 64);
    MOESAIC_TILE_LOAD(6, operand, 64);
    MOESAIC_TILE_LOAD(7, operand, 64);
    for (int64_t i = 0; i < rounds; ++i) {
        MOESAIC_TILE_DOT_BF16(0, 4, 6);
        MOESAIC_TILE_DOT_BF16(1, 4, 7);
        MOESAIC_TILE_DOT_BF16(2, 5, 6);
        MOESAIC_TILE_DOT_BF16(3, 5, 7);
    }
    sink[2] = 0.0f;
    MOESAIC_TILE_STORE(0, sums, 64);
    sink[2] += sums[0];
    MOESAIC_TILE_STORE(1, sums, 64);
    sink[2] += sums[0];
    MOESAIC_TILE_STORE(2, sums, 64);
    sink[2] += sums[0];
    MOESAIC_TILE_STORE(3, sums, 64);
    sink[2] += sums[0];
    release_tiles();
    return rounds * 4 * kTileTokens * 16 * 32 * 2;
}
#else
constexpr int64_t (*tile_bf16)(int64_t, float*) = nullptr;
#endif

}  // namespace

const ProbeKernels& probe_kernels() {
    static constexpr ProbeKernels kernels{sum, multiply_add_f32, dot_i8, tile_bf16};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
