// Router logits to experts, by sorting in double precision.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/route.h"
#include "oracle.h"
#include "parts.h"
#include "samples.h"

namespace check {

using moesaic::GroupScore;
using moesaic::RouteScore;

namespace {

struct RouteCase {
    std::int64_t num_experts, top_k;
    RouteScore score;
    GroupScore group_score = GroupScore::kNone;
    std::int64_t num_groups = 1, topk_groups = 1;
    bool biased = false;
};

void softmax(std::vector<double>& x) {
    const double largest = *std::max_element(x.begin(), x.end());
    double sum = 0.0;
    for (double& value : x) sum += value = std::exp(value - largest);
    for (double& value : x) value /= sum;
}

std::vector<std::int64_t> order_of(const std::vector<double>& values) {
    std::vector<std::int64_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return values[a] > values[b]; });
    return order;
}

// Scores of experts outside the best groups become `shut`.
void limit_groups(const RouteCase& c, std::vector<double>& choice) {
    const std::int64_t size = c.num_experts / c.num_groups;
    std::vector<double> of_groups;
    for (std::int64_t g = 0; g < c.num_groups; ++g) {
        std::vector<double> group(&choice[g * size], &choice[g * size] + size);
        std::sort(group.rbegin(), group.rend());
        of_groups.push_back(group[0] + (c.group_score == GroupScore::kSumOfTwo ? group[1] : 0.0));
    }
    const std::vector<std::int64_t> order = order_of(of_groups);
    for (std::size_t i = static_cast<std::size_t>(c.topk_groups); i < order.size(); ++i) {
        std::fill_n(&choice[order[i] * size], size, c.group_score == GroupScore::kMaximum ? 0.0 : -INFINITY);
    }
}

void check_case(Report& report, const RouteCase& c) {
    constexpr std::int64_t kTokens = 4;
    constexpr float kScale = 2.5f;
    Random random(41);
    const std::vector<float> logits = normals(random, kTokens * c.num_experts, 2.0);
    const std::vector<float> bias = normals(random, c.num_experts, 0.1);
    std::vector<std::int64_t> indices(kTokens * c.top_k), expected_indices;
    std::vector<float> weights(indices.size());
    std::vector<double> expected;
    for (std::int64_t t = 0; t < kTokens; ++t) {
        std::vector<double> scores(&logits[t * c.num_experts], &logits[t * c.num_experts] + c.num_experts);
        if (c.score == RouteScore::kSoftmax) softmax(scores);
        if (c.score == RouteScore::kSigmoid) {
            for (double& value : scores) value = 1.0 / (1.0 + std::exp(-value));
        }
        std::vector<double> choice = scores, chosen;
        for (std::int64_t i = 0; c.biased && i < c.num_experts; ++i) choice[i] += bias[i];
        if (c.group_score != GroupScore::kNone) limit_groups(c, choice);
        const std::vector<std::int64_t> order = order_of(choice);
        for (std::int64_t i = 0; i < c.top_k; ++i) {
            expected_indices.push_back(order[i]);
            chosen.push_back(c.group_score == GroupScore::kMaximum ? choice[order[i]] : scores[order[i]]);
        }
        if (c.score == RouteScore::kSoftmaxOfChosen) softmax(chosen);
        const double sum = std::accumulate(chosen.begin(), chosen.end(), 0.0);
        for (double value : chosen) expected.push_back(kScale * value / sum);
    }
    moesaic::route({logits.data(), c.num_experts, kTokens, c.num_experts, c.top_k, c.score,
                    c.biased ? bias.data() : nullptr, c.group_score, c.num_groups, c.topk_groups, true, 0.0f, 0.0f,
                    kScale, indices.data(), weights.data()});
    const std::string name = text("route ", c.top_k, " of ", c.num_experts, ", score ", static_cast<int>(c.score),
                                  ", groups ", static_cast<int>(c.group_score));
    report.expect(indices == expected_indices, name + ": experts");
    report.expect_close(weights, expected, kFloat32Sums, name + ": weights");
}

}  // namespace

void check_routing(Report& report) {
    for (auto score : {RouteScore::kSoftmax, RouteScore::kSigmoid, RouteScore::kSoftmaxOfChosen}) {
        check_case(report, {7, 2, score});
        check_case(report, {64, 6, score, GroupScore::kNone, 1, 1, score == RouteScore::kSigmoid});
    }
    check_case(report, {64, 6, RouteScore::kSigmoid, GroupScore::kSumOfTwo, 8, 4, true});
    check_case(report, {64, 6, RouteScore::kSoftmax, GroupScore::kMaximum, 8, 3});
    check_case(report, {512, 10, RouteScore::kSoftmax});
}

}  // namespace check
