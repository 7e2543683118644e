#include "team_experts.h"

#include <algorithm>
#include <cstring>

#include "block_steps.h"
#include "moe_tokens.h"
#include "ops/elementwise.h"
#include "ops/route.h"

namespace moesaic {

namespace {

std::int64_t num_pairs(const ExpertSlice& slice) { return (slice.intermediate + kPair - 1) / kPair; }

// Router and gate of the shared experts, of which either may be missing.
std::size_t router_matrices(const FeedForwardBlock& b, PanelRows (&matrices)[2]) {
    std::size_t count = 0;
    if (b.router.format != nullptr) matrices[count++] = rows_of(b.router);
    if (b.shared_gate.format != nullptr) matrices[count++] = rows_of(b.shared_gate);
    return count;
}

PanelRows down_of(const ChosenExpert& e, std::int64_t hidden) {
    return rows_of(e.slice->down, e.number, hidden, e.slice->intermediate);
}

// 32 rows of gate and up of an expert, through the activation, into its row of down's input.
void expand(const ChosenExpert& e, std::int64_t pair, std::int64_t hidden, TeamMemory& own, const InnerRows& inner,
            std::int64_t row, const std::uint8_t* next) {
    const ExpertSlice& s = *e.slice;
    const PanelRows up = rows_of(s.up, e.number, s.intermediate, hidden);
    const std::int64_t panel = pair * kMaxPanels;
    const int num_panels = static_cast<int>(std::min<std::int64_t>(kMaxPanels, num_panels_of(s.intermediate) - panel));
    float* values = own.products.data();
    float* gate = nullptr;
    if (s.gate.format != nullptr) {
        const PanelRows gates = rows_of(s.gate, e.number, s.intermediate, hidden);
        gate = own.gate.data();
        gates.multiply(panel, num_panels, own.token.as(gates.quantized()), gate, up.address(panel));
    }
    up.multiply(panel, num_panels, own.token.as(up.quantized()), values, next);
    const ActivationKernels& kernels = activation_kernels();
    kernels.activate(e.activation, gate, values, kPair, values);
    if (s.down.format->quantized) {
        kernels.quantize(values, 1, inner.groups + row * inner.stride + pair);
    } else {
        std::memcpy(inner.floats + (row * inner.stride + pair) * kPair, values, kPair * sizeof(float));
    }
}

// sums[32] = weighted sum over some experts of rows of down, panels [begin, end).
void contract(std::span<const ChosenExpert> experts, std::int64_t first_row, std::int64_t hidden,
              WorkQueue::Range panels, TeamMemory& own, const InnerRows& inner, float* sums) {
    std::fill_n(sums, kPair, 0.0f);
    const int num_panels = static_cast<int>(panels.end - panels.begin);
    for (std::size_t i = 0; i < experts.size(); ++i) {
        const PanelRows down = down_of(experts[i], hidden);
        const std::int64_t at = (first_row + static_cast<std::int64_t>(i)) * inner.stride;
        const void* token = down.quantized() ? static_cast<const void*>(inner.groups + at) : inner.floats + at * kPair;
        const bool last = i + 1 == experts.size();
        const PanelRows next = down_of(experts[last ? 0 : i + 1], hidden);
        down.multiply(panels.begin, num_panels, &token, own.products.data(),
                      next.address(last ? panels.end : panels.begin));
        activation_kernels().add_scaled(own.products.data(), experts[i].weight, kPair, sums);
    }
}

std::size_t num_routed(const FeedForwardBlock& b, const TeamMemory& own) {
    return own.chosen.size() - (b.shared != nullptr ? 1 : 0);
}

}  // namespace

FeedForwardSizes sizes_of(const FeedForwardBlock& b) {
    const std::int64_t top_k = b.router.format == nullptr ? 1 : b.routing.top_k;
    FeedForwardSizes sizes{b.router.rows, top_k, num_pairs(b.experts->slices.front())};
    if (b.shared != nullptr) {
        ++sizes.num_chosen;
        sizes.pairs = std::max(sizes.pairs, num_pairs(b.shared->slices.front()));
    }
    return sizes;
}

void multiply_router(const FeedForwardBlock& b, const Team& team, WorkQueue& queue, TeamMemory& own, float* logits) {
    PanelRows matrices[2];
    const std::size_t count = router_matrices(b, matrices);
    multiply_all(team, queue, {matrices, count}, own.token, own.products.data(),
                 [&](std::size_t i, std::int64_t first, std::int64_t rows, const float* products) {
                     const bool is_gate = i + 1 == count && b.shared_gate.format != nullptr;
                     std::copy_n(products, rows, logits + (is_gate ? b.router.rows : 0) + first);
                 });
}

void choose_experts(const FeedForwardBlock& b, const float* logits, TeamMemory& own) {
    own.chosen.clear();
    const Experts& e = *b.experts;
    if (b.router.format == nullptr) {
        own.chosen.push_back({&e.slices.front(), 0, 1.0f, e.activation});
    } else {
        RouteArgs a = b.routing;
        const auto top_k = static_cast<std::size_t>(a.top_k);
        a.logits = logits;
        a.logits_stride = b.router.rows;
        a.num_tokens = 1;
        a.num_experts = b.router.rows;
        a.indices = own.indices.reserve(top_k);
        a.weights = own.weights.reserve(top_k);
        route(a);
        for (std::size_t i = 0; i < top_k; ++i) {
            own.chosen.push_back({&e.slices.front(), a.indices[i], a.weights[i], e.activation});
        }
        // Summed from the first expert to the last.
        std::sort(own.chosen.begin(), own.chosen.end(),
                  [](const ChosenExpert& x, const ChosenExpert& y) { return x.number < y.number; });
    }
    if (b.shared != nullptr) own.chosen.push_back({&b.shared->slices.front(), 0, 1.0f, b.shared->activation});
}

void expand_experts(const FeedForwardBlock& b, const Team& team, WorkQueue& queue, TeamMemory& own,
                    const InnerRows& inner) {
    const std::int64_t hidden = b.experts->hidden;
    std::int64_t total = 0;
    for (const ChosenExpert& e : own.chosen) total += num_pairs(*e.slice);
    auto place_of = [&](std::int64_t item) {
        std::size_t row = 0;
        for (; item >= num_pairs(*own.chosen[row].slice); ++row) item -= num_pairs(*own.chosen[row].slice);
        return std::pair{row, item};
    };
    const WorkQueue::Range share = own_part(team, total);
    queue.give(team.thread(), share.begin, share.end);
    for (std::int64_t item; (item = queue.next(team.thread())) >= 0;) {
        const auto [row, pair] = place_of(item);
        const auto [next_row, next_pair] = place_of(item + 1 < total ? item + 1 : item);
        const ChosenExpert& next = own.chosen[next_row];
        const ExpertMatrices& first = next.slice->gate.format != nullptr ? next.slice->gate : next.slice->up;
        expand(own.chosen[row], pair, hidden, own, inner, static_cast<std::int64_t>(row),
               rows_of(first, next.number, next.slice->intermediate, hidden).address(next_pair * kMaxPanels));
    }
}

void contract_experts(const FeedForwardBlock& b, const Team& team, WorkQueue& queue, TeamMemory& own,
                      const InnerRows& inner, const float* gate, float* x) {
    const std::int64_t hidden = b.experts->hidden;
    const std::size_t routed = num_routed(b, own);
    const std::span<const ChosenExpert> chosen = own.chosen;
    const WorkQueue::Range share = own_part(team, num_panels_of(hidden));
    queue.give(team.thread(), share.begin, share.end);
    for (WorkQueue::Range panels; next_panels(queue, team.thread(), panels);) {
        const std::int64_t first = panels.begin * kPanelRows;
        const std::int64_t rows = std::min(panels.end * kPanelRows, hidden) - first;
        float* sums = own.sums.data();
        contract(chosen.first(routed), 0, hidden, panels, own, inner, sums);
        if (b.shared != nullptr) {
            float* shared = own.shared.data();
            contract(chosen.subspan(routed), static_cast<std::int64_t>(routed), hidden, panels, own, inner, shared);
            RowOpArgs a{};
            a.op = b.shared_gate.format != nullptr ? RowOp::kAddGated : RowOp::kAddScaled;
            a.scale = 1.0f;
            a.gate = gate;
            a.x = a.out = sums;
            a.y = shared;
            a.num_rows = 1;
            a.width = rows;
            row_op(a);
        }
        add_scaled(x + first, sums, b.residual_scale, 1, rows, x + first);
    }
}

void add_router(Ahead& ahead, const FeedForwardBlock& b, const Team& team) {
    PanelRows matrices[2];
    add_own_part(ahead, team, {matrices, router_matrices(b, matrices)});
}

void add_down(Ahead& ahead, const FeedForwardBlock& b, const Team& team, const std::vector<ChosenExpert>& chosen) {
    const WorkQueue::Range share = own_part(team, num_panels_of(b.experts->hidden));
    for (std::int64_t panel = share.begin; panel < share.end; panel += kMaxPanels) {
        const std::int64_t end = std::min<std::int64_t>(panel + kMaxPanels, share.end);
        for (const ChosenExpert& e : chosen) {
            const PanelRows down = down_of(e, b.experts->hidden);
            ahead.add(down.address(panel), down.address(end) - down.address(panel));
        }
    }
}

}  // namespace moesaic
