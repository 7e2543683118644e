#include "moe.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/prepared_tokens.h"
#include "kernels/scratch.h"
#include "moe_assignment.h"
#include "moe_tokens.h"
#include "read_ahead.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace moesaic {

namespace {

constexpr std::int64_t kPanel = 16;  // rows of an item of down, which threads take in pairs

// Up to 32 rows of a matrix, from a panel's first on.
struct Rows {
    std::int64_t first, count, cols;
    int num_panels() const { return static_cast<int>((count + kPanel - 1) / kPanel); }
};

// out[t][0..31] = those rows of an expert's matrix times the tokens, plus the bias. `next`: what this thread will
// probably read afterwards.
void multiply_rows(const ExpertMatrices& m, const MatmulKernels& kernels, const Rows& rows, std::int64_t expert,
                   const ExpertTokens& tokens, float* out, const std::uint8_t* next) {
    const std::uint8_t* panels =
        m.weights + expert * m.matrix_bytes + rows.first / kPanel * m.format->panel_bytes(rows.cols);
    if (wants_bf16(kernels, rows.cols, tokens.count)) {
        kernels.matmul_bf16(panels, rows.num_panels(), rows.cols, tokens.bf16, tokens.count, out, next);
    } else {
        kernels.matmul(panels, rows.num_panels(), rows.cols, tokens.rows, tokens.count, out, next);
    }
    for (std::int64_t t = 0; t < tokens.count; ++t) {
        float* y = out + t * kOutputStride;
        std::fill(y + kPanel * rows.num_panels(), y + kOutputStride, 0.0f);
        if (m.bias == nullptr) continue;
        const float* bias = m.bias + expert * m.bias_stride + rows.first;
        for (std::int64_t r = 0; r < rows.count; ++r) y[r] += bias[r];
    }
}

// A slice in one call: its items of gate and up, and what they leave for down.
struct SliceWork {
    const ExpertSlice& slice;
    std::int64_t first_item;  // of gate and up
    std::int64_t num_pairs;   // of the intermediate rows
    InnerTokens inner;        // input of down for every slot

    SliceWork(const ExpertSlice& s, std::int64_t first, const Assignment& assignment)
        : slice(s),
          first_item(first),
          num_pairs((s.intermediate + kPair - 1) / kPair),
          inner(*s.down.format, s.intermediate, assignment) {}
};

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
    struct alignas(64) Arrivals {
        std::atomic<std::size_t> count{0};
    };

    void expand_item(std::int64_t item, const std::uint8_t* next, Buffers& buffers);
    void contract_items(WorkQueue::Range items, Buffers& buffers);
    void store(std::size_t slice, const Rows& rows, const float* sums);
    void add_slices(std::int64_t panel);

    std::size_t slice_of(std::int64_t item) const;
    const std::uint8_t* inner_address(std::int64_t item) const;
    const std::uint8_t* down_address(std::size_t slice, std::int64_t active, std::int64_t panel) const;
    const std::uint8_t* outer_address(std::int64_t item) const {
        return down_address(static_cast<std::size_t>(item / num_panels_), a_.by_number[0], item % num_panels_);
    }
    ReadAhead first_outer(std::int64_t item) const;
    float* partial(std::int64_t panel, std::size_t slice) {
        return partial_.data() +
               (panel * static_cast<std::int64_t>(slices_.size()) + static_cast<std::int64_t>(slice)) * num_tokens_ *
                   kPanel;
    }

    const Experts& e_;
    const Assignment& a_;
    std::int64_t num_tokens_;
    float* out_;
    const MatmulKernels* kernels_;
    SlotTokens input_;  // of gate and up
    std::vector<SliceWork> slices_;
    std::int64_t num_items_ = 0;            // of gate and up
    std::int64_t num_panels_;               // of the output
    AlignedArray<float> partial_;           // [num_panels, slices, num_tokens, 16] if there are several slices
    std::unique_ptr<Arrivals[]> arrivals_;  // at each panel
};

Forward::Forward(const Experts& experts, const Assignment& assignment, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out)
    : e_(experts),
      a_(assignment),
      num_tokens_(num_tokens),
      out_(out),
      kernels_(matmul_table().formats),
      input_(assignment, {experts.slices.front().gate.format, experts.slices.front().up.format}, experts.hidden,
             num_tokens, [&](std::int64_t t) { return x + t * x_stride; }),
      num_panels_((experts.hidden + kPanel - 1) / kPanel) {
    slices_.reserve(experts.slices.size());
    for (const ExpertSlice& slice : experts.slices) {
        slices_.emplace_back(slice, num_items_, a_);
        num_items_ += a_.num_active() * slices_.back().num_pairs;
    }
    if (slices_.size() == 1) return;
    partial_.reserve(static_cast<std::size_t>(num_panels_ * num_tokens * kPanel) * slices_.size());
    arrivals_ = std::make_unique<Arrivals[]>(static_cast<std::size_t>(num_panels_));
}

std::size_t Forward::slice_of(std::int64_t item) const {
    std::size_t s = slices_.size() - 1;
    while (item < slices_[s].first_item) --s;
    return s;
}

// Where the panels begin that an item of gate and up reads first.
const std::uint8_t* Forward::inner_address(std::int64_t item) const {
    const SliceWork& w = slices_[slice_of(item)];
    const ExpertMatrices& m = w.slice.gate.format != nullptr ? w.slice.gate : w.slice.up;
    const std::int64_t active = (item - w.first_item) / w.num_pairs, pair = (item - w.first_item) % w.num_pairs;
    return m.weights + a_.experts[active] * m.matrix_bytes + pair * kMaxPanels * m.format->panel_bytes(e_.hidden);
}

const std::uint8_t* Forward::down_address(std::size_t slice, std::int64_t active, std::int64_t panel) const {
    const ExpertSlice& s = slices_[slice].slice;
    return s.down.weights + a_.experts[active] * s.down.matrix_bytes +
           panel * s.down.format->panel_bytes(s.intermediate);
}

// What a thread reads for the items of the output from this one on.
ReadAhead Forward::first_outer(std::int64_t item) const {
    const std::int64_t panel = item % num_panels_, count = std::min<std::int64_t>(kMaxPanels, num_panels_ - panel);
    const auto slice = static_cast<std::size_t>(item / num_panels_);
    const ExpertSlice& s = slices_[slice].slice;
    ReadAhead ahead;
    for (std::int64_t active : a_.by_number) {
        ahead.add(down_address(slice, active, panel), count * s.down.format->panel_bytes(s.intermediate));
    }
    return ahead;
}

// 32 rows of gate and up for the tokens of one expert, through the activation, into the input of down.
void Forward::expand_item(std::int64_t item, const std::uint8_t* next, Buffers& buffers) {
    SliceWork& w = slices_[slice_of(item)];
    const ActivationKernels& kernels = activation_kernels();
    const std::int64_t active = (item - w.first_item) / w.num_pairs, pair = (item - w.first_item) % w.num_pairs;
    const std::int64_t count = a_.num_slots(active), first = a_.first[active];
    const Rows rows{pair * kPair, std::min(kPair, w.slice.intermediate - pair * kPair), e_.hidden};
    auto project = [&](const ExpertMatrices& m, float* out, const std::uint8_t* then) {
        const ExpertTokens tokens = input_.of_expert(active, m.format->quantized, buffers.tokens);
        multiply_rows(m, kernels_[m.format->index], rows, a_.experts[active], tokens, out, then);
    };
    float* up = buffers.up.reserve(output_size(count));
    float* gate = nullptr;
    if (w.slice.gate.format != nullptr) {
        const ExpertMatrices& m = w.slice.up;
        gate = buffers.gate.reserve(output_size(count));
        project(w.slice.gate, gate,
                m.weights + a_.experts[active] * m.matrix_bytes + pair * kMaxPanels * m.format->panel_bytes(e_.hidden));
    }
    project(w.slice.up, up, next);
    kernels.activate(e_.activation, gate, up, count * kPair, up);
    for (std::int64_t i = 0; i < count; ++i) w.inner.store(first + i, pair, up + i * kPair, count);
}

// One or two panels of the output: the weighted sum of a slice of down over all experts.
void Forward::contract_items(WorkQueue::Range items, Buffers& buffers) {
    const auto slice = static_cast<std::size_t>(items.begin / num_panels_);
    const SliceWork& w = slices_[slice];
    const std::int64_t panel = items.begin % num_panels_, num_active = a_.num_active();
    const std::int64_t num_rows = std::min((items.end - items.begin) * kPanel, e_.hidden - panel * kPanel);
    const Rows rows{panel * kPanel, num_rows, w.slice.intermediate};
    const ActivationKernels& kernels = activation_kernels();
    // Summed apart: the rows of out are often a power of two apart, where caches hold few of them.
    float* sums = buffers.sums.reserve(static_cast<std::size_t>(num_tokens_ * kPair));
    std::fill_n(sums, num_tokens_ * kPair, 0.0f);
    for (std::int64_t i = 0; i < num_active; ++i) {
        const std::int64_t active = a_.by_number[i];
        const std::int64_t count = a_.num_slots(active), first = a_.first[active];
        const ExpertTokens tokens = w.inner.of_expert(first, count, buffers.tokens);
        float* y = buffers.up.reserve(output_size(count));
        const bool last = i + 1 == num_active;
        multiply_rows(w.slice.down, kernels_[w.slice.down.format->index], rows, a_.experts[active], tokens, y,
                      last ? down_address(slice, a_.by_number[0], panel + rows.num_panels())
                           : down_address(slice, a_.by_number[i + 1], panel));
        for (std::int64_t t = 0; t < count; ++t) {
            const Slot& slot = a_.slots[first + t];
            kernels.add_scaled(y + t * kPair, slot.weight, kPair, sums + slot.token * kPair);
        }
    }
    store(slice, rows, sums);
}

// Rows of the output, or of a slice's part of it.
void Forward::store(std::size_t slice, const Rows& rows, const float* sums) {
    if (slices_.size() == 1) {
        for (std::int64_t t = 0; t < num_tokens_; ++t) {
            std::copy_n(sums + t * kPair, rows.count, out_ + t * e_.hidden + rows.first);
        }
        return;
    }
    for (int p = 0; p < rows.num_panels(); ++p) {
        const std::int64_t panel = rows.first / kPanel + p;
        float* part = partial(panel, slice);
        for (std::int64_t t = 0; t < num_tokens_; ++t)
            std::copy_n(sums + t * kPair + p * kPanel, kPanel, part + t * kPanel);
        const std::size_t arrived =
            arrivals_[static_cast<std::size_t>(panel)].count.fetch_add(1, std::memory_order_acq_rel);
        if (arrived + 1 == slices_.size()) add_slices(panel);
    }
}

// The output's rows of a panel whose parts are all there.
void Forward::add_slices(std::int64_t panel) {
    const std::int64_t num_rows = std::min(kPanel, e_.hidden - panel * kPanel);
    for (std::int64_t t = 0; t < num_tokens_; ++t) {
        float* out = out_ + t * e_.hidden + panel * kPanel;
        std::copy_n(partial(panel, 0) + t * kPanel, num_rows, out);
        for (std::size_t s = 1; s < slices_.size(); ++s) {
            const float* part = partial(panel, s) + t * kPanel;
            for (std::int64_t r = 0; r < num_rows; ++r) out[r] += part[r];
        }
    }
}

// Items of each slice go to the threads of its node first.
WorkQueue queue_of(std::span<const std::int64_t> items_of_slices, const ThreadPool& pool) {
    return WorkQueue(group_work(items_of_slices, pool.threads_per_node()));
}

void Forward::run() {
    std::vector<std::int64_t> inner(slices_.size()), outer(slices_.size(), num_panels_);
    for (std::size_t s = 0; s < slices_.size(); ++s) inner[s] = a_.num_active() * slices_[s].num_pairs;
    ThreadPool& pool = thread_pool();
    WorkQueue inner_items = queue_of(inner, pool), outer_items = queue_of(outer, pool);
    pool.run([&](Team& team) {
        static thread_local Buffers buffers;
        const std::int64_t inner_end = inner_items.share(team.thread()).end;
        const std::int64_t outer_first = std::min(outer_items.share(team.thread()).begin,
                                                  static_cast<std::int64_t>(slices_.size()) * num_panels_ - 1);
        for (std::int64_t item; (item = inner_items.next(team.thread())) >= 0;) {
            // Where its share ends, a thread hardly ever finds more to do before the barrier.
            const bool more = item + 1 != inner_end && item + 1 < num_items_;
            expand_item(item, more ? inner_address(item + 1) : outer_address(outer_first), buffers);
        }
        ReadAhead outer = first_outer(outer_first);
        team.barrier(outer);
        for (WorkQueue::Range items; outer_items.next(team.thread(), kMaxPanels, items);) {
            const std::int64_t end_of_slice = (items.begin / num_panels_ + 1) * num_panels_;
            contract_items({items.begin, std::min(items.end, end_of_slice)}, buffers);
            if (items.end > end_of_slice) contract_items({end_of_slice, items.end}, buffers);
        }
    });
}

}  // namespace

void check_experts(const Experts& e) {
    if (e.num_experts < 1 || e.slices.empty())
        throw std::invalid_argument("experts need at least one expert and slice");
    for (const ExpertSlice& s : e.slices) {
        if (s.up.format == nullptr || s.down.format == nullptr) {
            throw std::invalid_argument("experts need the projections up and down");
        }
        const ExpertSlice& first = e.slices.front();
        if (s.gate.format != first.gate.format || s.up.format != first.up.format ||
            s.down.format != first.down.format) {
            throw std::invalid_argument("the slices of experts must have the same formats");
        }
        check_matrix(*s.up.format, s.intermediate, e.hidden);
        check_matrix(*s.down.format, e.hidden, s.intermediate);
        if (s.gate.format != nullptr) check_matrix(*s.gate.format, s.intermediate, e.hidden);
        if (s.gate.format == nullptr && e.activation.kind == ActivationKind::kSwigluOai) {
            throw std::invalid_argument("the activation swiglu_oai needs a gate projection");
        }
    }
}

void moe_forward(const Experts& experts, const Routing& routing, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out) {
    check_experts(experts);
    const Assignment assignment = assign(routing, num_tokens, experts.num_experts);
    if (assignment.num_active() == 0) {
        std::fill_n(out, num_tokens * experts.hidden, 0.0f);
        return;
    }
    Forward(experts, assignment, x, x_stride, num_tokens, out).run();
}

}  // namespace moesaic
