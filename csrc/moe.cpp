#include "moe.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/prepared_tokens.h"
#include "kernels/scratch.h"
#include "thread_pool.h"
#include "work_queue.h"

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

// Up to 32 rows of a matrix.
struct Rows {
    std::int64_t first, of_matrix, cols;
    std::int64_t here() const { return std::min(kPair, of_matrix - first); }
};

// out[t][0..31] = those rows of an expert's matrix, which begin at `panels`, times the tokens, plus the bias. `next`:
// what this thread will probably read afterwards.
void multiply_rows(const ExpertMatrices& m, const MatmulKernels* kernels, const Rows& rows, std::int64_t expert,
                   const std::uint8_t* panels, const void* const* tokens, std::int64_t num_tokens, float* out,
                   const std::uint8_t* next) {
    const int num_panels = static_cast<int>((rows.here() + 15) / 16);
    kernels[m.format->index].matmul(panels, num_panels, rows.cols, tokens, num_tokens, out, next);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        float* y = out + t * kOutputStride;
        std::fill(y + 16 * num_panels, y + kOutputStride, 0.0f);
        if (m.bias == nullptr) continue;
        const float* bias = m.bias + expert * rows.of_matrix + rows.first;
        for (std::int64_t r = 0; r < rows.here(); ++r) y[r] += bias[r];
    }
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
        AlignedArray<float> sums;      // [num_tokens, 32]
        std::vector<const void*> tokens;
    };

    void expand_item(std::int64_t item, const std::uint8_t* next, Buffers& buffers);
    void contract_item(std::int64_t pair, Buffers& buffers);
    const std::uint8_t* inner_address(const ExpertMatrices& m, std::int64_t item) const;
    const std::uint8_t* down_address(std::int64_t active, std::int64_t pair) const;
    std::int64_t num_slots(std::int64_t active) const { return a_.first[active + 1] - a_.first[active]; }

    const Experts& e_;
    const Assignment& a_;
    std::int64_t num_tokens_;
    float* out_;
    const MatmulKernels* kernels_;
    PreparedTokens input_;       // of gate and up
    std::int64_t inner_pairs_;   // of the intermediate rows
    std::int64_t inner_stride_;  // pairs from slot to slot; odd, so that slots fall into different cache sets
    AlignedArray<float> inner_;  // input of down for every slot, in the form
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
      inner_pairs_((experts.intermediate + kPair - 1) / kPair),
      inner_stride_(inner_pairs_ | 1) {
    const auto size = static_cast<std::size_t>(inner_stride_) * a_.slots.size();
    if (e_.down.format->quantized) {
        inner_quantized_.reserve(size);
    } else {
        inner_.reserve(size * kPair);
    }
}

// Where the panels of an item of gate or up begin.
const std::uint8_t* Forward::inner_address(const ExpertMatrices& m, std::int64_t item) const {
    const std::int64_t expert = a_.experts[item / inner_pairs_], pair = item % inner_pairs_;
    return m.weights + expert * m.matrix_bytes + pair * kMaxPanels * m.format->panel_bytes(e_.hidden);
}

const std::uint8_t* Forward::down_address(std::int64_t active, std::int64_t pair) const {
    return e_.down.weights + a_.experts[active] * e_.down.matrix_bytes +
           pair * kMaxPanels * e_.down.format->panel_bytes(e_.intermediate);
}

// 32 rows of gate and up for the tokens of one expert, through the activation, into the input of down.
void Forward::expand_item(std::int64_t item, const std::uint8_t* next, Buffers& buffers) {
    const ActivationKernels& kernels = activation_kernels();
    const std::int64_t active = item / inner_pairs_, pair = item % inner_pairs_;
    const std::int64_t count = num_slots(active), first = a_.first[active];
    buffers.tokens.resize(static_cast<std::size_t>(count));
    auto project = [&](const ExpertMatrices& m, float* out, const std::uint8_t* then) {
        const void* const* all = input_.tokens(m.format->quantized);
        for (std::int64_t i = 0; i < count; ++i) buffers.tokens[i] = all[a_.slots[first + i].token];
        const Rows rows{pair * kPair, e_.intermediate, e_.hidden};
        multiply_rows(m, kernels_, rows, a_.experts[active], inner_address(m, item), buffers.tokens.data(), count, out,
                      then);
    };
    float* up = buffers.up.reserve(static_cast<std::size_t>(count * kPair));
    float* gate = nullptr;
    if (e_.gate.format != nullptr) {
        gate = buffers.gate.reserve(static_cast<std::size_t>(count * kPair));
        project(e_.gate, gate, inner_address(e_.up, item));
    }
    project(e_.up, up, next);
    kernels.activate(e_.activation, gate, up, count * kPair, up);
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = (first + i) * inner_stride_ + pair;
        if (e_.down.format->quantized) {
            kernels.quantize(up + i * kPair, 1, inner_quantized_.data() + at);
        } else {
            std::memcpy(inner_.data() + at * kPair, up + i * kPair, kPair * sizeof(float));
        }
    }
}

// 32 rows of the output: the weighted sum of down over all experts.
void Forward::contract_item(std::int64_t pair, Buffers& buffers) {
    const auto num_active = static_cast<std::int64_t>(a_.experts.size());
    const Rows rows{pair * kPair, e_.hidden, e_.intermediate};
    const ActivationKernels& kernels = activation_kernels();
    // Summed apart: the rows of out are often a power of two apart, where caches hold few of them.
    float* sums = buffers.sums.reserve(static_cast<std::size_t>(num_tokens_ * kPair));
    std::fill_n(sums, num_tokens_ * kPair, 0.0f);
    for (std::int64_t active = 0; active < num_active; ++active) {
        const std::int64_t count = num_slots(active), first = a_.first[active];
        buffers.tokens.resize(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t at = (first + i) * inner_stride_;
            buffers.tokens[i] = e_.down.format->quantized ? static_cast<const void*>(inner_quantized_.data() + at)
                                                          : inner_.data() + at * kPair;
        }
        float* y = buffers.up.reserve(static_cast<std::size_t>(count * kPair));
        const bool last = active + 1 == num_active;
        multiply_rows(e_.down, kernels_, rows, a_.experts[active], down_address(active, pair), buffers.tokens.data(),
                      count, y, last ? down_address(0, pair + 1) : down_address(active + 1, pair));
        for (std::int64_t i = 0; i < count; ++i) {
            const Slot& slot = a_.slots[first + i];
            kernels.add_scaled(y + i * kPair, slot.weight, kPair, sums + slot.token * kPair);
        }
    }
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
        std::copy_n(sums + t * kPair, rows.here(), out_ + t * e_.hidden + rows.first);
    }
}

void Forward::run() {
    const std::int64_t num_items = static_cast<std::int64_t>(a_.experts.size()) * inner_pairs_;
    const std::int64_t outer_pairs = (e_.hidden + kPair - 1) / kPair;
    const ExpertMatrices& read_first = e_.gate.format != nullptr ? e_.gate : e_.up;
    ThreadPool& pool = thread_pool();
    WorkQueue inner_items(num_items, pool.num_threads()), outer_items(outer_pairs, pool.num_threads());
    pool.run([&](Team& team) {
        static thread_local Buffers buffers;
        for (std::int64_t item; (item = inner_items.next(team.thread())) >= 0;) {
            const std::uint8_t* next = item + 1 < num_items
                                           ? inner_address(read_first, item + 1)
                                           : down_address(0, team.thread() * outer_pairs / team.num_threads());
            expand_item(item, next, buffers);
        }
        team.barrier();
        for (std::int64_t item; (item = outer_items.next(team.thread())) >= 0;) contract_item(item, buffers);
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
