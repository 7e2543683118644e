// Products of one token by the threads of a team that stays together from one to the next.
//
// Every thread prepares the token for itself, which takes less than waiting for another one to do it, and has the same
// rows of a matrix each time, so that it can fetch their first bytes before it may begin. Numbers are those of linear()
// and moe_forward(), to the bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "blocks.h"
#include "kernels/activations.h"
#include "kernels/matmul.h"
#include "kernels/scratch.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace moesaic {

constexpr std::int64_t kPanelRows = 16;

// Values [cols] in the forms that products take, for one thread.
class OneToken {
  public:
    // x has to outlive this; only floats unless `quantized`.
    void set(const float* x, std::int64_t cols, bool quantized) {
        floats_ = x;
        if (!quantized) return;
        ActivationGroup* groups = memory_.reserve(static_cast<std::size_t>(cols / kActivationGroup));
        activation_kernels().quantize(x, cols / kActivationGroup, groups);
        groups_ = groups;
    }
    // As MatmulKernels::matmul takes tokens.
    const void* const* as(bool quantized) const { return quantized ? &groups_ : &floats_; }

  private:
    AlignedArray<ActivationGroup> memory_;
    const void* groups_ = nullptr;
    const void* floats_ = nullptr;
};

// Memory that a thread is about to read: its first bytes are fetched into the second-level cache, some lines at a time.
class Ahead {
  public:
    void clear() {
        count_ = at_ = 0;
        left_ = budget();
    }
    void add(const std::uint8_t* begin, std::int64_t bytes) {
        bytes = std::min(bytes, left_);
        if (count_ == kMost || bytes <= 0) return;
        ranges_[count_++] = {begin, begin + bytes};
        left_ -= bytes;
    }
    // All that is left: for what others have no part in.
    void rest() {
        while (at_ < count_) (*this)();
    }
    // A few lines more; as idle() of Team::barrier().
    void operator()() {
        for (int i = 0; i < kLinesAtOnce && at_ < count_; ++i) {
            Range& range = ranges_[at_];
            __builtin_prefetch(range.next, 0, 2);
            range.next += kLine;
            if (range.next >= range.end) ++at_;
        }
    }

  private:
    static constexpr int kMost = 24, kLinesAtOnce = 8;
    static constexpr std::int64_t kLine = 64;
    static std::int64_t budget();  // a part of the second-level cache
    struct Range {
        const std::uint8_t *next, *end;
    };
    Range ranges_[kMost];
    int count_ = 0, at_ = 0;
    std::int64_t left_ = 0;
};

inline std::int64_t num_panels_of(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// The part of `count` items that is a thread's own.
inline WorkQueue::Range own_part(const Team& team, std::int64_t count) {
    return {count * team.thread() / team.num_threads(), count * (team.thread() + 1) / team.num_threads()};
}

// Rows of a matrix from panel `panel` on, up to two panels of them, times a token, plus the bias: out has room for
// output_size(1) floats, of which those behind the rows are 0. Returns how many rows there are.
struct PanelRows {
    const FormatInfo* format;
    const std::uint8_t* weights;  // of the matrix
    std::int64_t rows, cols;
    const float* bias;

    const std::uint8_t* address(std::int64_t panel) const { return weights + panel * format->panel_bytes(cols); }
    bool quantized() const { return format->quantized; }
    std::int64_t multiply(std::int64_t panel, int num_panels, const void* const* token, float* out,
                          const std::uint8_t* next) const;
};

inline PanelRows rows_of(const PackedMatrix& m) { return {m.format, m.weights, m.rows, m.cols, m.bias}; }
inline PanelRows rows_of(const ExpertMatrices& m, std::int64_t expert, std::int64_t rows, std::int64_t cols) {
    return {m.format, m.weights + expert * m.matrix_bytes, rows, cols,
            m.bias == nullptr ? nullptr : m.bias + expert * m.bias_stride};
}

// The next panels for a thread: two at a time, but its own last ones singly, so that all are done at about the same
// time.
inline bool next_panels(WorkQueue& queue, int thread, WorkQueue::Range& panels) {
    const WorkQueue::Range own = queue.share(thread);
    return queue.next(thread, own.end - own.begin > kMaxPanels ? kMaxPanels : 1, panels);
}

// Panels of several matrices with the same input, one after the other, shared out to a team. write(matrix, first row,
// number of rows, products) is called for up to two panels at a time.
template <class Write>
void multiply_all(const Team& team, WorkQueue& queue, std::span<const PanelRows> matrices, const OneToken& token,
                  float* products, Write&& write) {
    std::int64_t total = 0;
    for (const PanelRows& m : matrices) total += num_panels_of(m.rows);
    const WorkQueue::Range own = own_part(team, total);
    queue.give(team.thread(), own.begin, own.end);
    for (WorkQueue::Range items; next_panels(queue, team.thread(), items);) {
        std::int64_t before = 0;
        for (std::size_t i = 0; i < matrices.size(); ++i) {
            const PanelRows& m = matrices[i];
            const std::int64_t count = num_panels_of(m.rows);
            const std::int64_t begin = std::max(items.begin - before, std::int64_t{0});
            const std::int64_t end = std::min(items.end - before, count);
            before += count;
            if (begin >= end) continue;
            const std::uint8_t* next = end < count ? m.address(end) : m.address(begin);
            if (end == count && i + 1 < matrices.size()) next = matrices[i + 1].address(0);
            const std::int64_t rows =
                m.multiply(begin, static_cast<int>(end - begin), token.as(m.quantized()), products, next);
            write(i, begin * kPanelRows, rows, products);
        }
    }
}

// What a thread will read of them first.
void add_own_part(Ahead& ahead, const Team& team, std::span<const PanelRows> matrices);

}  // namespace moesaic
