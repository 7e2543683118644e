#include "moe_assignment.h"

#include <algorithm>
#include <numeric>

#include "kernels/matmul.h"

namespace moesaic {

Assignment assign(const Routing& routing, std::int64_t num_tokens, std::int64_t num_experts) {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(num_experts), 0);
    const std::int64_t num_choices = num_tokens * routing.top_k;
    auto is_expert = [&](std::int64_t e) { return e >= 0 && e < num_experts; };
    for (std::int64_t i = 0; i < num_choices; ++i) {
        if (is_expert(routing.experts[i])) ++counts[static_cast<std::size_t>(routing.experts[i])];
    }
    Assignment a;
    for (std::int64_t e = 0; e < num_experts; ++e) {
        if (counts[static_cast<std::size_t>(e)] > 0) a.experts.push_back(e);
    }
    std::stable_sort(a.experts.begin(), a.experts.end(), [&](std::int64_t x, std::int64_t y) {
        return counts[static_cast<std::size_t>(x)] > counts[static_cast<std::size_t>(y)];
    });
    a.first.assign(1, 0);
    a.by_number.resize(a.experts.size());
    std::iota(a.by_number.begin(), a.by_number.end(), 0);
    std::sort(a.by_number.begin(), a.by_number.end(), [&](std::int64_t x, std::int64_t y) {
        return a.experts[static_cast<std::size_t>(x)] < a.experts[static_cast<std::size_t>(y)];
    });
    std::vector<std::int64_t> next(static_cast<std::size_t>(num_experts), 0);
    for (std::int64_t e : a.experts) {
        next[static_cast<std::size_t>(e)] = a.first.back();
        a.first.push_back(a.first.back() + counts[static_cast<std::size_t>(e)]);
    }
    a.slots.resize(static_cast<std::size_t>(a.first.back()));
    for (std::int64_t i = 0; i < num_choices; ++i) {
        const std::int64_t e = routing.experts[i];
        if (!is_expert(e)) continue;
        const auto slot = static_cast<std::size_t>(next[static_cast<std::size_t>(e)]++);
        a.slots[slot] = {i / routing.top_k, routing.weights[i]};
    }
    a.tiled_slots.reserve(a.slots.size());
    for (std::int64_t active = 0; active < a.num_active(); ++active) {
        for (std::int64_t i = 0; i < a.num_slots(active); ++i) a.tiled_slots.push_back(a.num_tiled + i);
        a.num_tiled += padded_tokens(a.num_slots(active));
    }
    return a;
}

}  // namespace moesaic
