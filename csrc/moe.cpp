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
#include "moe_items.h"
#include "moe_rows.h"
#include "moe_tokens.h"
#include "read_ahead.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace moesaic {

namespace {

// A slice in one call, and what its items of gate and up leave for down.
struct SliceWork {
    const ExpertSlice& slice;
    InnerTokens inner;  // input of down for every slot

    SliceWork(const ExpertSlice& s, const Assignment& assignment)
        : slice(s), inner(*s.down.format, s.intermediate, assignment) {}
};

// Where the experts that were read ahead are among the active ones.
std::vector<std::int64_t> active_of(std::span<const std::int64_t> ready, const Assignment& assignment) {
    std::vector<std::int64_t> active;
    for (const std::int64_t expert : ready) {
        const auto found = std::find(assignment.experts.begin(), assignment.experts.end(), expert);
        if (found != assignment.experts.end()) active.push_back(found - assignment.experts.begin());
    }
    return active;
}

// One call in flight: what its work items share.
class Forward {
  public:
    Forward(const Experts& experts, const Assignment& assignment, const float* x, std::int64_t x_stride,
            std::int64_t num_tokens, float* out, std::span<const std::int64_t> ready, ThreadPool& pool);
    void run(const Beside* beside);

  private:
    struct Buffers {
        AlignedArray<float> gate, up;  // [pairs, tokens of the expert, 32]
        AlignedArray<float> sums;      // [num_tokens, rows]
        ExpertRows input;              // of gate and up
        std::vector<const void*> tokens;
    };
    struct alignas(64) Arrivals {
        std::atomic<std::size_t> count{0};
    };

    int most_inner() const;
    int most_outer() const;
    void expand_items(WorkQueue::Range items, const std::uint8_t* next, Buffers& buffers);
    void contract_items(WorkQueue::Range items, Buffers& buffers);
    void store(std::size_t slice, const Rows& rows, const float* sums, std::int64_t stride);
    void add_slices(std::int64_t panel);

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

    ThreadPool& pool_;
    const Experts& e_;
    const Assignment& a_;
    std::int64_t num_tokens_;
    float* out_;
    const MatmulKernels* kernels_;
    SlotTokens input_;  // of gate and up
    std::vector<SliceWork> slices_;
    InnerItems inner_items_;
    std::int64_t num_panels_;               // of the output
    AlignedArray<float> partial_;           // [num_panels, slices, num_tokens, 16] if there are several slices
    std::unique_ptr<Arrivals[]> arrivals_;  // at each panel
};

Forward::Forward(const Experts& experts, const Assignment& assignment, const float* x, std::int64_t x_stride,
                 std::int64_t num_tokens, float* out, std::span<const std::int64_t> ready, ThreadPool& pool)
    : pool_(pool),
      e_(experts),
      a_(assignment),
      num_tokens_(num_tokens),
      out_(out),
      kernels_(matmul_table().formats),
      input_(assignment, {experts.slices.front().gate.format, experts.slices.front().up.format}, experts.hidden,
             num_tokens, [&](std::int64_t t) { return x + t * x_stride; }),
      inner_items_(pairs_of_slices(experts), a_.num_active(), active_of(ready, a_), pool.threads_per_node()),
      num_panels_((experts.hidden + kPanel - 1) / kPanel) {
    slices_.reserve(experts.slices.size());
    for (const ExpertSlice& slice : experts.slices) slices_.emplace_back(slice, a_);
    if (slices_.size() == 1) return;
    partial_.reserve(static_cast<std::size_t>(num_panels_ * num_tokens * kPanel) * slices_.size());
    arrivals_ = std::make_unique<Arrivals[]>(static_cast<std::size_t>(num_panels_));
}

// Where the panels begin that an item of gate and up reads first.
const std::uint8_t* Forward::inner_address(std::int64_t item) const {
    const ItemRun& run = inner_items_.run_of(item);
    const ExpertSlice& slice = slices_[run.slice].slice;
    const ExpertMatrices& m = slice.gate.format != nullptr ? slice.gate : slice.up;
    const std::int64_t panel = run.pair_of(item) * kMaxPanels;
    return m.weights + a_.experts[run.expert] * m.matrix_bytes + panel * m.format->panel_bytes(e_.hidden);
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

// How many items a thread takes at most. Where experts have many tokens, several: these come from the second-level
// cache for all items but the first.
int Forward::most_inner() const {
    return static_cast<std::int64_t>(a_.slots.size()) > 2 * kTokenPadding * a_.num_active() ? kMaxTilePairs : 1;
}
int Forward::most_outer() const {
    return static_cast<std::int64_t>(a_.slots.size()) > kTokenPadding / 2 * a_.num_active() ? kMaxPanels * kMaxTilePairs
                                                                                            : kMaxPanels;
}

// Pairs of 32 rows of gate and up for the tokens of one expert, through the activation, into the input of down.
void Forward::expand_items(WorkQueue::Range items, const std::uint8_t* next, Buffers& buffers) {
    const ItemRun& run = inner_items_.run_of(items.begin);
    SliceWork& w = slices_[run.slice];
    const ActivationKernels& kernels = activation_kernels();
    const std::int64_t active = run.expert, pair = run.pair_of(items.begin), num_pairs = items.end - items.begin;
    const std::int64_t count = a_.num_slots(active), first = a_.first[active], size = pair_size(count);
    const Rows rows{pair * kPair, std::min(num_pairs * kPair, w.slice.intermediate - pair * kPair), e_.hidden};
    auto project = [&](const ExpertMatrices& m, float* out, const std::uint8_t* then) {
        const ExpertTokens tokens = input_.of_expert(active, *m.format, buffers.input);
        multiply_rows(m, kernels_[m.format->index], rows, a_.experts[active], tokens, out, then);
    };
    float* up = buffers.up.reserve(static_cast<std::size_t>(num_pairs * size));
    float* gate = nullptr;
    if (w.slice.gate.format != nullptr) {
        const ExpertMatrices& m = w.slice.up;
        gate = buffers.gate.reserve(static_cast<std::size_t>(num_pairs * size));
        project(w.slice.gate, gate,
                m.weights + a_.experts[active] * m.matrix_bytes + pair * kMaxPanels * m.format->panel_bytes(e_.hidden));
    }
    project(w.slice.up, up, next);
    for (std::int64_t p = 0; p < num_pairs; ++p, up += size) {
        kernels.activate(e_.activation, gate != nullptr ? gate + p * size : nullptr, up, count * kPair, up);
        for (std::int64_t i = 0; i < count; ++i) w.inner.store(first + i, pair + p, up + i * kPair, count);
    }
}

// Some panels of the output: the weighted sum of a slice of down over all experts.
void Forward::contract_items(WorkQueue::Range items, Buffers& buffers) {
    const auto slice = static_cast<std::size_t>(items.begin / num_panels_);
    const SliceWork& w = slices_[slice];
    const std::int64_t panel = items.begin % num_panels_, num_active = a_.num_active();
    const std::int64_t num_rows = std::min((items.end - items.begin) * kPanel, e_.hidden - panel * kPanel);
    const Rows rows{panel * kPanel, num_rows, w.slice.intermediate};
    const std::int64_t stride = rows.num_pairs() * kPair;
    const ActivationKernels& kernels = activation_kernels();
    // Summed apart: the rows of out are often a power of two apart, where caches hold few of them.
    float* sums = buffers.sums.reserve(static_cast<std::size_t>(num_tokens_ * stride));
    std::fill_n(sums, num_tokens_ * stride, 0.0f);
    for (std::int64_t i = 0; i < num_active; ++i) {
        const std::int64_t active = a_.by_number[i];
        const std::int64_t count = a_.num_slots(active), first = a_.first[active], size = pair_size(count);
        const ExpertTokens tokens = w.inner.of_expert(first, count, buffers.tokens);
        float* y = buffers.up.reserve(static_cast<std::size_t>(rows.num_pairs() * size));
        const bool last = i + 1 == num_active;
        multiply_rows(w.slice.down, kernels_[w.slice.down.format->index], rows, a_.experts[active], tokens, y,
                      last ? down_address(slice, a_.by_number[0], panel + rows.num_panels())
                           : down_address(slice, a_.by_number[i + 1], panel));
        for (std::int64_t t = 0; t < count; ++t) {
            const Slot& slot = a_.slots[first + t];
            for (std::int64_t p = 0; p < rows.num_pairs(); ++p) {
                kernels.add_scaled(y + p * size + t * kPair, slot.weight, kPair,
                                   sums + slot.token * stride + p * kPair);
            }
        }
    }
    store(slice, rows, sums, stride);
}

// Rows of the output, or of a slice's part of it, whose sums are `stride` floats apart from token to token.
void Forward::store(std::size_t slice, const Rows& rows, const float* sums, std::int64_t stride) {
    if (slices_.size() == 1) {
        for (std::int64_t t = 0; t < num_tokens_; ++t) {
            std::copy_n(sums + t * stride, rows.count, out_ + t * e_.hidden + rows.first);
        }
        return;
    }
    for (std::int64_t p = 0; p < rows.num_panels(); ++p) {
        const std::int64_t panel = rows.first / kPanel + p;
        float* part = partial(panel, slice);
        for (std::int64_t t = 0; t < num_tokens_; ++t)
            std::copy_n(sums + t * stride + p * kPanel, kPanel, part + t * kPanel);
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

void Forward::run(const Beside* beside) {
    // Items of each slice go to the threads of its node first.
    const std::vector<std::int64_t> outer(slices_.size(), num_panels_);
    WorkQueue outer_items(group_work(outer, pool_.threads_per_node()));
    WorkQueue& inner_items = inner_items_.queue();
    const int most_inner = this->most_inner(), most_outer = this->most_outer();
    pool_.run([&](Team& team) {
        static thread_local Buffers buffers;
        buffers.input.active = -1;  // of another call
        if (beside != nullptr && team.thread() == 0) (*beside)();
        const std::int64_t inner_end = inner_items.share(team.thread()).end;
        const std::int64_t outer_first = std::min(outer_items.share(team.thread()).begin,
                                                  static_cast<std::int64_t>(slices_.size()) * num_panels_ - 1);
        for (WorkQueue::Range taken; inner_items.next_part(team.thread(), 4, 1, most_inner, taken);) {
            for (std::int64_t item = taken.begin, end; item < taken.end; item = end) {
                end = std::min(taken.end, inner_items_.run_of(item).end);
                // Where its share ends, a thread hardly ever finds more to do before the barrier.
                const bool more = end != inner_end && end < inner_items_.count();
                expand_items({item, end}, more ? inner_address(end) : outer_address(outer_first), buffers);
            }
        }
        ReadAhead outer = first_outer(outer_first);
        team.barrier(outer);
        for (WorkQueue::Range items; outer_items.next_part(team.thread(), 2, kMaxPanels, most_outer, items);) {
            for (std::int64_t item = items.begin, end; item < items.end; item = end) {
                end = std::min(items.end, (item / num_panels_ + 1) * num_panels_);  // of the slice
                contract_items({item, end}, buffers);
            }
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
                 std::int64_t num_tokens, float* out, const Beside* beside, std::span<const std::int64_t> ready) {
    check_experts(experts);
    const Assignment assignment = assign(routing, num_tokens, experts.num_experts);
    if (assignment.num_active() == 0) {
        if (beside != nullptr) (*beside)();
        std::fill_n(out, num_tokens * experts.hidden, 0.0f);
        return;
    }
    Forward(experts, assignment, x, x_stride, num_tokens, out, ready, thread_pool()).run(beside);
}

}  // namespace moesaic
