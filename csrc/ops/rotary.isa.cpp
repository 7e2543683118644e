#include "ops/rotary.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

// cos and sin of one token, contiguous.
struct Angles {
    const float* cos;
    const float* sin;
};

MOESAIC_INLINE int lanes(int64_t left) { return left < 16 ? static_cast<int>(left) : 16; }

void rotate_half(float* x, const Angles& t, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i += 16) {
        const int n = lanes(pairs - i);
        const vf a = load_n(x + i, n), b = load_n(x + pairs + i, n);
        const vf c = load_n(t.cos + i, n), s = load_n(t.sin + i, n);
        store_n(x + i, sub(mul(a, c), mul(b, s)), n);
        store_n(x + pairs + i, fma(a, s, mul(b, c)), n);
    }
}

void rotate_interleaved(float* __restrict x, const Angles& t, int64_t pairs) {
    const float* __restrict cos = t.cos;
    const float* __restrict sin = t.sin;
    for (int64_t i = 0; i < pairs; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

void rotate_interleaved_to_half(float* x, const Angles& t, int64_t pairs) {
    float first[kMaxRotaryPairs], second[kMaxRotaryPairs];
    for (int64_t i = 0; i < pairs; ++i) {
        first[i] = x[2 * i];
        second[i] = x[2 * i + 1];
    }
    for (int64_t i = 0; i < pairs; ++i) {
        x[i] = first[i] * t.cos[i] - second[i] * t.sin[i];
        x[pairs + i] = second[i] * t.cos[i] + first[i] * t.sin[i];
    }
}

void rotate(const RotaryArgs& a, const Angles& t, float* x) {
    switch (a.layout) {
        case RopeLayout::kHalf:
            return rotate_half(x, t, a.num_pairs);
        case RopeLayout::kInterleaved:
            return rotate_interleaved(x, t, a.num_pairs);
        case RopeLayout::kInterleavedToHalf:
            return rotate_interleaved_to_half(x, t, a.num_pairs);
    }
}

float sum_of_squares(const float* x, int64_t n) {
    vf sum = set1(0.0f);
    for (int64_t i = 0; i < n; i += 16) {
        const vf v = load_n(x + i, lanes(n - i));
        sum = fma(v, v, sum);
    }
    return reduce_add(sum);
}

void scale_head(const RotaryArgs& a, float factor, const float* weight, float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const int m = lanes(n - i);
        const vf w = add(load_n(weight + i, m), set1(a.weight_offset));
        store_n(x + i, mul(mul(load_n(x + i, m), set1(factor)), w), m);
    }
}

float norm_factor(const RotaryArgs& a, float sum, int64_t n) {
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + a.eps);
}

void norm_head(const RotaryArgs& a, const Heads& h, float* x) {
    scale_head(a, norm_factor(a, sum_of_squares(x, h.head_dim), h.head_dim), h.norm_weight, x, h.head_dim);
}

void norm_all_heads(const RotaryArgs& a, const Heads& h, float* x) {
    float sum = 0.0f;
    for (int64_t i = 0; i < h.num_heads; ++i) sum += sum_of_squares(x + i * h.stride.head, h.head_dim);
    const float factor = norm_factor(a, sum, h.num_heads * h.head_dim);
    for (int64_t i = 0; i < h.num_heads; ++i) {
        scale_head(a, factor, h.norm_weight + i * h.head_dim, x + i * h.stride.head, h.head_dim);
    }
}

void heads_of_token(const RotaryArgs& a, const Heads& h, const Angles& t, int64_t batch, int64_t token) {
    if (h.num_heads == 0) return;
    float* x = h.data + batch * h.stride.batch + token * h.stride.token;
    if (a.norm == HeadNorm::kAllHeads) norm_all_heads(a, h, x);
    for (int64_t i = 0; i < h.num_heads; ++i, x += h.stride.head) {
        if (a.norm == HeadNorm::kPerHead) norm_head(a, h, x);
        if (a.num_pairs > 0) rotate(a, t, x);
        if (a.norm == HeadNorm::kPerHeadAfterRope) norm_head(a, h, x);
    }
}

void token(const RotaryArgs& a, int64_t batch, int64_t token) {
    float cos[kMaxRotaryPairs], sin[kMaxRotaryPairs];
    const int64_t offset = batch * a.angle_batch_stride + token * a.angle_token_stride;
    for (int64_t i = 0; i < a.num_pairs; ++i) {
        cos[i] = a.cos[offset + i * a.angle_stride];
        sin[i] = a.sin[offset + i * a.angle_stride];
    }
    heads_of_token(a, a.q, {cos, sin}, batch, token);
    heads_of_token(a, a.k, {cos, sin}, batch, token);
}

}  // namespace

const RotaryKernels& rotary_kernels() {
    static constexpr RotaryKernels kernels{token};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
