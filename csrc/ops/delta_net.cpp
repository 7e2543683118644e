#include "ops/delta_net.h"

#include <cmath>
#include <stdexcept>

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(DeltaNetKernels, delta_net_kernels)

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(sequence, item) for every sequence's items, of about `floats` floats per token each; neighbours stay together.
template <class Body>
void for_items(const DeltaNetArgs& a, int64_t items, int64_t floats, Body&& body) {
    const int64_t tokens_each = divide_up(a.num_tokens, a.num_sequences);
    for_rows(a.num_sequences * items, floats * tokens_each, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i / items, i % items);
    });
}

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

void compute_gates(const DeltaNetArgs& a, int64_t token) {
    const float* x = a.x + token * a.x_stride;
    float* decay = a.gates + token * 2 * a.heads;
    float* beta = decay + a.heads;
    for (int64_t h = 0; h < a.heads; ++h) {
        decay[h] = std::exp(-a.rate[h] * softplus(x[a.decay_columns[h]] + a.step_bias[h]));
        beta[h] = 1.0f / (1.0f + std::exp(-x[a.beta_columns[h]]));
    }
}

}  // namespace

void check_delta_net(const DeltaNetArgs& a, int64_t num_slots) {
    if (a.starts[0] != 0 || a.starts[a.num_sequences] != a.num_tokens) {
        throw std::invalid_argument("the starts do not divide all tokens");
    }
    for (int64_t s = 0; s < a.num_sequences; ++s) {
        if (a.starts[s + 1] <= a.starts[s]) throw std::invalid_argument("a sequence without tokens");
        if (a.slots[s] < 0 || a.slots[s] >= num_slots) throw std::invalid_argument("a slot that is not there");
    }
}

void delta_net(const DeltaNetArgs& a) {
    if (a.num_tokens == 0) return;
    const DeltaNetKernels& kernels = delta_net_kernels();
    const int64_t key_width = 2 * a.key_heads * a.key_dim, value_width = a.heads * a.value_dim;
    for_items(a, divide_up(a.channels(), kDeltaLanes), kDeltaLanes * a.taps,
              [&](int64_t sequence, int64_t block) { kernels.convolve(a, sequence, block * kDeltaLanes); });
    for_rows(a.num_tokens, 2 * key_width + 32 * a.heads, [&](int64_t begin, int64_t end) {
        kernels.normalize(a, begin, end);
        for (int64_t token = begin; token < end; ++token) compute_gates(a, token);
    });
    const int64_t blocks = divide_up(a.value_dim, kDeltaColumns);
    for_items(a, a.heads * blocks, 2 * a.key_dim * kDeltaColumns, [&](int64_t sequence, int64_t item) {
        kernels.recur(a, sequence, item / blocks, item % blocks * kDeltaColumns);
    });
    for_rows(a.num_tokens, 4 * value_width, [&](int64_t begin, int64_t end) { kernels.finish(a, begin, end); });
}

}  // namespace moesaic
