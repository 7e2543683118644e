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
    const vb weights = set1_b(static_cast<uint8_t>(four[0] & 127));
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < kChains; ++j) sums[j] = dot4<false>(sums[j], weights, four);
    }
    for (int j = 1; j < kChains; ++j) sums[0] = add(sums[0], sums[j]);
    sink[2] = static_cast<float>(reduce_add(sums[0]));
    return rounds * kChains * 64 * 2;
}

}  // namespace

const ProbeKernels& probe_kernels() {
    static constexpr ProbeKernels kernels{sum, multiply_add_f32, dot_i8};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
