#include "ops/route.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

MOESAIC_INLINE int lanes(int64_t left) { return left < 16 ? static_cast<int>(left) : 16; }

// x = softmax(x)
void softmax(float* x, int64_t n) {
    float largest = x[0];
    for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i += 16) {
        const int m = lanes(n - i);
        store_n(x + i, exp(sub(load_n(x + i, m), set1(largest))), m);
        for (int64_t j = i; j < i + m; ++j) sum += x[j];
    }
    for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

void scores_of(const RouteArgs& a, const float* logits, float* scores) {
    for (int64_t i = 0; i < a.num_experts; i += 16) {
        const int m = lanes(a.num_experts - i);
        const vf x = load_n(logits + i, m);
        store_n(scores + i, a.score == RouteScore::kSigmoid ? sigmoid(x) : x, m);
    }
    if (a.score == RouteScore::kSoftmax) softmax(scores, a.num_experts);
}

// Is a ranked before b? As in torch.topk, NaN counts as the largest.
bool before(float a, float b) { return a > b || (a != a && b == b); }

// Indices of the k best of n values, best first, the lower index first among equals (insertion into a sorted list).
void choose(const float* values, int64_t n, int64_t k, int64_t* chosen) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (count == k && !before(values[i], values[chosen[k - 1]])) continue;
        int64_t place = count < k ? count++ : k - 1;
        for (; place > 0 && before(values[i], values[chosen[place - 1]]); --place) chosen[place] = chosen[place - 1];
        chosen[place] = i;
    }
}

float group_value(GroupScore kind, const float* scores, int64_t n) {
    int64_t best[2] = {0, 0};
    const int64_t k = kind == GroupScore::kSumOfTwo && n > 1 ? 2 : 1;
    choose(scores, n, k, best);
    return k == 2 ? scores[best[0]] + scores[best[1]] : scores[best[0]];
}

// Shuts out the experts of all groups but the best topk_groups.
void limit_groups(const RouteArgs& a, float* choice) {
    float values[kMaxRouteExperts];
    int64_t chosen[kMaxRouteExperts];
    bool open[kMaxRouteExperts];
    const int64_t size = a.num_experts / a.num_groups;
    for (int64_t g = 0; g < a.num_groups; ++g) {
        values[g] = group_value(a.group_score, choice + g * size, size);
        open[g] = false;
    }
    choose(values, a.num_groups, a.topk_groups, chosen);
    for (int64_t i = 0; i < a.topk_groups; ++i) open[chosen[i]] = true;
    const float shut = a.group_score == GroupScore::kMaximum ? 0.0f : kNegativeInfinity;
    for (int64_t i = 0; i < a.num_experts; ++i) choice[i] = open[i / size] ? choice[i] : shut;
}

void finish_weights(const RouteArgs& a, float* weights) {
    if (a.score == RouteScore::kSoftmaxOfChosen) softmax(weights, a.top_k);
    float factor = a.scale;
    if (a.normalize) {
        float sum = a.sum_offset;
        for (int64_t i = 0; i < a.top_k; ++i) sum += weights[i];
        factor /= sum < a.sum_minimum ? a.sum_minimum : sum;
    }
    for (int64_t i = 0; i < a.top_k; ++i) weights[i] *= factor;
}

void token(const RouteArgs& a, int64_t token) {
    float scores[kMaxRouteExperts], choice[kMaxRouteExperts];
    scores_of(a, a.logits + token * a.logits_stride, scores);
    for (int64_t i = 0; i < a.num_experts; ++i) choice[i] = scores[i] + (a.bias == nullptr ? 0.0f : a.bias[i]);
    if (a.group_score != GroupScore::kNone) limit_groups(a, choice);
    int64_t* indices = a.indices + token * a.top_k;
    float* weights = a.weights + token * a.top_k;
    choose(choice, a.num_experts, a.top_k, indices);
    // DeepSeek-V2 takes the weight of a shut-out expert, chosen for want of others, as 0.
    const float* source = a.group_score == GroupScore::kMaximum ? choice : scores;
    for (int64_t i = 0; i < a.top_k; ++i) weights[i] = source[indices[i]];
    finish_weights(a, weights);
}

}  // namespace

const RouteKernels& route_kernels() {
    static constexpr RouteKernels kernels{token};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
