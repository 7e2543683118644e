#include "block_steps.h"
#include "ops/elementwise.h"
#include "team_step.h"

namespace moesaic {

namespace {

// Routing of one call, and the shared experts' trivial one: expert 0 for every token.
struct Choice {
    std::int64_t* experts;
    float* weights;
};

void choose(const FeedForwardBlock& b, const float* normed, std::int64_t num_tokens, float* logits, Choice choice) {
    const LinearJob job = job_of(b.router, logits);
    linear({&job, 1}, {normed, b.router.cols}, num_tokens);
    RouteArgs a = b.routing;
    a.logits = logits;
    a.logits_stride = b.router.rows;
    a.num_tokens = num_tokens;
    a.num_experts = b.router.rows;
    a.indices = choice.experts;
    a.weights = choice.weights;
    route(a);
}

void choose_first(std::int64_t num_tokens, Choice choice) {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        choice.experts[t] = 0;
        choice.weights[t] = 1.0f;
    }
}

// out += shared experts(normed), gated if there is a gate.
void add_shared(const FeedForwardBlock& b, const float* normed, std::int64_t num_tokens, float* out) {
    const std::int64_t width = b.experts->hidden;
    AlignedArray<std::int64_t> zeros(static_cast<std::size_t>(num_tokens));
    AlignedArray<float> floats(static_cast<std::size_t>(num_tokens * (width + 2)));
    float* shared = floats.data();
    float* ones = shared + num_tokens * width;
    float* gates = ones + num_tokens;
    choose_first(num_tokens, {zeros.data(), ones});
    moe_forward(*b.shared, {zeros.data(), ones, 1}, normed, width, num_tokens, shared);
    RowOpArgs a{};
    a.op = RowOp::kAddScaled;
    a.scale = 1.0f;
    if (b.shared_gate.format != nullptr) {
        const LinearJob job = job_of(b.shared_gate, gates);
        linear({&job, 1}, {normed, width}, num_tokens);
        a.op = RowOp::kAddGated;
        a.gate = gates;
    }
    a.x = out;
    a.y = shared;
    a.out = out;
    a.x_stride = a.y_stride = a.out_stride = width;
    a.num_rows = num_tokens;
    a.width = width;
    row_op(a);
}

}  // namespace

void feed_forward_block(const FeedForwardBlock& b, float* x, std::int64_t num_tokens) {
    if (num_tokens == 1 && runs_in_team(b)) {
        AttentionBlockCall call{};
        call.out = x;
        const LayerHalf half{nullptr, {}, &b};
        return run_in_team({&half, 1}, call);
    }
    const std::int64_t width = b.experts->hidden;
    const std::int64_t top_k = b.router.format == nullptr ? 1 : b.routing.top_k;
    Buffers buffers(num_tokens * (2 * width + top_k + b.router.rows) + 4 * 16);
    float* normed = buffers.take(padded(num_tokens * width));
    float* out = buffers.take(padded(num_tokens * width));
    float* weights = buffers.take(padded(num_tokens * top_k));
    float* logits = buffers.take(padded(num_tokens * b.router.rows));
    thread_local AlignedArray<std::int64_t> indices;
    const Choice choice{indices.reserve(static_cast<std::size_t>(num_tokens * top_k)), weights};

    normalize(b.norm, x, width, num_tokens, width, normed);
    if (b.router.format == nullptr) {
        choose_first(num_tokens, choice);
    } else {
        choose(b, normed, num_tokens, logits, choice);
    }
    moe_forward(*b.experts, {choice.experts, choice.weights, top_k}, normed, width, num_tokens, out);
    if (b.shared != nullptr) add_shared(b, normed, num_tokens, out);
    add_scaled(x, out, b.residual_scale, num_tokens, width, x);
}

}  // namespace moesaic
