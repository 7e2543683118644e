#include "deferral.h"

#include <algorithm>
#include <stdexcept>

namespace moesaic {

namespace {

// How many of a token's weights are below that of choice j. Whatever is no number is above none.
std::int64_t rank_of(const float* weights, std::int64_t top_k, std::int64_t j) {
    std::int64_t below = 0;
    for (std::int64_t i = 0; i < top_k; ++i) below += weights[i] < weights[j] || (weights[i] == weights[j] && i > j);
    return below;
}

}  // namespace

Deferral::Deferral(std::int64_t max_tokens, std::int64_t hidden_size, std::int64_t top_k)
    : max_tokens_(max_tokens), hidden_size_(hidden_size), top_k_(top_k) {}

const std::int64_t* Deferral::put_off(const Routing& routing, const float* x, std::int64_t num_tokens,
                                      std::int64_t count) {
    if (num_tokens > max_tokens_ || routing.top_k != top_k_) {
        throw std::invalid_argument("more tokens or experts than experts can be put off of");
    }
    const auto num_choices = static_cast<std::size_t>(num_tokens * top_k_);
    now_.assign(routing.experts, routing.experts + num_choices);
    later_.assign(num_choices, -1);
    bool any = false;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        for (std::int64_t j = 0; j < top_k_; ++j) {
            const auto choice = static_cast<std::size_t>(t * top_k_ + j);
            if (now_[choice] < 0 || rank_of(routing.weights + t * top_k_, top_k_, j) >= count) continue;
            std::swap(now_[choice], later_[choice]);
            any = true;
        }
    }
    waiting_ = any ? num_tokens : 0;
    if (!any) return now_.data();
    weights_.assign(routing.weights, routing.weights + num_choices);
    x_.assign(x, x + num_tokens * hidden_size_);
    return now_.data();
}

bool Deferral::compute(const Experts& experts) {
    if (waiting_ == 0) return false;
    sum_.resize(static_cast<std::size_t>(waiting_ * hidden_size_));
    moe_forward(experts, {later_.data(), weights_.data(), top_k_}, x_.data(), hidden_size_, waiting_, sum_.data());
    computed_ = waiting_;
    waiting_ = 0;
    return true;
}

void Deferral::deliver(float* out, std::int64_t num_tokens) {
    if (computed_ == 0) return;
    if (num_tokens != computed_) throw std::logic_error("the layers of a step have different numbers of tokens");
    for (std::int64_t i = 0; i < num_tokens * hidden_size_; ++i) out[i] += sum_[static_cast<std::size_t>(i)];
    computed_ = 0;
}

void Deferral::forget() { waiting_ = computed_ = 0; }

}  // namespace moesaic
