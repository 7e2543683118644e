// Router logits -> the experts of each token and their weights.
//
// One description covers the routers of Mixtral and Qwen (softmax, top-k, renormalise), gpt-oss and Granite (top-k,
// softmax over the chosen), DeepSeek-V3, GLM-4.5 and MiniMax-M2 (sigmoid, selection bias, groups; Liu et al., arXiv
// 2412.19437), DeepSeek-V2 (softmax, groups by their maximum, arXiv 2405.04434) and Ernie (softmax, selection bias).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

enum class RouteScore : int32_t {
    kSoftmax = 0,          // over all experts
    kSigmoid = 1,          //
    kSoftmaxOfChosen = 2,  // experts are chosen by logits; softmax over the chosen ones
};

enum class GroupScore : int32_t {
    kNone = 0,
    kSumOfTwo = 1,  // the two best of the group; experts of other groups cannot be chosen (DeepSeek-V3)
    kMaximum = 2,   // the best one; scores of other groups become 0 (DeepSeek-V2)
};

struct RouteArgs {
    const float* logits;  // [tokens, experts]
    int64_t logits_stride;
    int64_t num_tokens, num_experts, top_k;
    RouteScore score;
    const float* bias;  // [experts], added to the score for the choice only; null: none
    GroupScore group_score;
    int64_t num_groups, topk_groups;
    bool normalize;  // weights /= max(sum + sum_offset, sum_minimum)
    float sum_offset, sum_minimum;
    float scale;       // weights *= scale, last
    int64_t* indices;  // [tokens, top_k], best first; of equal scores the lower index comes first
    float* weights;    // [tokens, top_k]
};

constexpr int64_t kMaxRouteExperts = 4096;

struct RouteKernels {
    void (*token)(const RouteArgs& a, int64_t token);
};
MOESAIC_DECLARE_KERNELS(RouteKernels, route_kernels)

void route(const RouteArgs& a);

}  // namespace moesaic
