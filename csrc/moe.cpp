#include "moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/prepared_tokens.h"
#include "kernels/scratch.h"
#include "thread_pool.h"

namespace moesaic {

namespace {

constexpr std::int64_t kPair = kOutputStride;  // rows of one work item: two panels, one activation group

// A token's choice of an expert.
struct Slot {
    std::int64_t token;
    float weight;
};

// The slots sorted by expert: those of active expert a are [first[a], first[a + 1]).
struct Assignment {
    std::vector<std::int64_t> experts;  // active ones, those with most tokens first: no long item starts last
    std::vector<std::int64_t> first;
    std::vector<Slot> slots;
};

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
    return a;
}

// One call in flight: what its work items share.
class Forward {
  public:
    Forward(const Experts& experts, const Assignment& assignment, const float* x, std::int64_t x_stride,
            std::int64_t num_tokens, float* out);
    void run();

  private:
    struct Buffers {
        AlignedArray<float> gate, up;  // [tokens of the expert, 32]
        std::vector<const void*> tokens;
    };

    void expand_item(std::int64_t active, std::int64_t pair, Buffers& buffers);
    void contract_item(std::int64_t pair, Buffers& buffers);
    void project(const ExpertMatrices& m, std::int64_t rows, std::int64_t cols, std::int64_t expert, std::int64_t pair,
                 const void* const* tokens, std::int64_t num_tokens, float* out) const;
    std::int64_t num_slots(std::int64_t active) const { return a_.first[active + 1] - a_.first[active]; }

    const Experts& e_;
    const Assignment& a_;
    std::int64_t num_tokens_;
    float* out_;
    const MatmulKernels* kernels_;
    PreparedTokens input_;                           // of gate and up
    std::int64_t inner_stride_;                      // intermediate, padded to pairs
    AlignedArray<float> inner_;                      // input of down for every slot, in the form
    AlignedArray<ActivationGroup> inner_quantized_;  // that its format wants
};

Forward::Forward(const Experts& experts, const Assignment& assignment, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out)
    : e_(experts),
      a_(assignment),
      num_tokens_(num_tokens),
      out_(out),
      kernels_(matmul_table().formats),
      input_(num_tokens, experts.hidden,
             experts.up.format->quantized || (experts.gate.format != nullptr && experts.gate.format->quantized),
             [&](std::int64_t t) { return x + t * x_stride; }),
      inner_stride_((experts.intermediate + kPair - 1) / kPair * kPair) {
    const auto size = static_cast<std::size_t>(inner_stride_) * a_.slots.size();
    if (e_.down.format->quantized) {
        inner_quantized_.reserve(size / kPair);
    } else {
        inner_.reserve(size);
    }
}

// out[t][0..31] = rows [32 pair, 32 pair + 32) of one expert's matrix times the tokens, plus the bias.
void Forward::project(const ExpertMatrices& m, std::int64_t rows, std::int64_t cols, std::int64_t expert,
                      std::int64_t pair, const void* const* tokens, std::int64_t num_tokens, float* out) const {
    const std::int64_t panel_bytes = m.format->panel_bytes(cols), first_row = pair * kPair;
    const int rows_here = static_cast<int>(std::min(kPair, rows - first_row));
    const int num_panels = (rows_here + 15) / 16;
    const std::uint8_t* panels[kMaxPanels];
    for (int p = 0; p < num_panels; ++p) {
        panels[p] = m.weights + expert * m.matrix_bytes + (first_row / 16 + p) * panel_bytes;
    }
    kernels_[m.format->index].matmul(panels, num_panels, cols, tokens, num_tokens, out);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        float* y = out + t * kOutputStride;
        std::fill(y + 16 * num_panels, y + kOutputStride, 0.0f);
        if (m.bias == nullptr) continue;
        const float* bias = m.bias + expert * rows + first_row;
        for (int r = 0; r < rows_here; ++r) y[r] += bias[r];
    }
}

// 32 rows of gate and up for the tokens of one expert, through the activation, into the input of down.
void Forward::expand_item(std::int64_t active, std::int64_t pair, Buffers& buffers) {
    const ActivationKernels& kernels = activation_kernels();
    const std::int64_t count = num_slots(active), first = a_.first[active], expert = a_.experts[active];
    buffers.tokens.resize(static_cast<std::size_t>(count));
    auto tokens_for = [&](const FormatInfo& format) {
        const void* const* all = input_.tokens(format.quantized);
        for (std::int64_t i = 0; i < count; ++i) buffers.tokens[i] = all[a_.slots[first + i].token];
        return buffers.tokens.data();
    };
    float* up = buffers.up.reserve(static_cast<std::size_t>(count * kPair));
    float* gate = nullptr;
    if (e_.gate.format != nullptr) {
        gate = buffers.gate.reserve(static_cast<std::size_t>(count * kPair));
        project(e_.gate, e_.intermediate, e_.hidden, expert, pair, tokens_for(*e_.gate.format), count, gate);
    }
    project(e_.up, e_.intermediate, e_.hidden, expert, pair, tokens_for(*e_.up.format), count, up);
    kernels.activate(e_.activation, gate, up, count * kPair, up);
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = (first + i) * inner_stride_ + pair * kPair;
        if (e_.down.format->quantized) {
            kernels.quantize(up + i * kPair, 1, inner_quantized_.data() + at / kPair);
        } else {
            std::memcpy(inner_.data() + at, up + i * kPair, kPair * sizeof(float));
        }
    }
}

// 32 rows of the output: the weighted sum of down over all experts.
void Forward::contract_item(std::int64_t pair, Buffers& buffers) {
    const std::int64_t first_row = pair * kPair, rows_here = std::min(kPair, e_.hidden - first_row);
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
        std::fill_n(out_ + t * e_.hidden + first_row, rows_here, 0.0f);
    }
    for (std::int64_t active = 0; active < static_cast<std::int64_t>(a_.experts.size()); ++active) {
        const std::int64_t count = num_slots(active), first = a_.first[active];
        buffers.tokens.resize(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t at = (first + i) * inner_stride_;
            buffers.tokens[i] = e_.down.format->quantized
                                    ? static_cast<const void*>(inner_quantized_.data() + at / kPair)
                                    : inner_.data() + at;
        }
        float* y = buffers.up.reserve(static_cast<std::size_t>(count * kPair));
        project(e_.down, e_.hidden, e_.intermediate, a_.experts[active], pair, buffers.tokens.data(), count, y);
        for (std::int64_t i = 0; i < count; ++i) {
            const Slot& slot = a_.slots[first + i];
            float* out = out_ + slot.token * e_.hidden + first_row;
            for (std::int64_t r = 0; r < rows_here; ++r) out[r] += slot.weight * y[i * kPair + r];
        }
    }
}

void Forward::run() {
    const std::int64_t inner_pairs = inner_stride_ / kPair, outer_pairs = (e_.hidden + kPair - 1) / kPair;
    Counter inner_items(static_cast<std::int64_t>(a_.experts.size()) * inner_pairs), outer_items(outer_pairs);
    thread_pool().run([&](Team& team) {
        static thread_local Buffers buffers;
        for (std::int64_t item, end; inner_items.next(item, end);) {
            expand_item(item / inner_pairs, item % inner_pairs, buffers);
        }
        team.barrier();
        for (std::int64_t item, end; outer_items.next(item, end);) contract_item(item, buffers);
    });
}

}  // namespace

void check_experts(const Experts& e) {
    if (e.num_experts < 1 || e.up.format == nullptr || e.down.format == nullptr) {
        throw std::invalid_argument("experts need at least one expert and the projections up and down");
    }
    check_matrix(*e.up.format, e.intermediate, e.hidden);
    check_matrix(*e.down.format, e.hidden, e.intermediate);
    if (e.gate.format != nullptr) check_matrix(*e.gate.format, e.intermediate, e.hidden);
    if (e.gate.format == nullptr && e.activation.kind == ActivationKind::kSwigluOai) {
        throw std::invalid_argument("the activation swiglu_oai needs a gate projection");
    }
}

void moe_forward(const Experts& experts, const Routing& routing, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out) {
    check_experts(experts);
    const Assignment assignment = assign(routing, num_tokens, experts.num_experts);
    Forward(experts, assignment, x, x_stride, num_tokens, out).run();
}

}  // namespace moesaic
