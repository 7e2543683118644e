// The items of gate and up of one call, pairs of 32 rows: in what order they are and which thread takes which.
//
// They are in the order of experts, each thread having its own share of all. Where some experts were read ahead, each
// thread first has those of their pairs that it read, which lie in its cache, and then its share of the others. Knows
// neither weights nor tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "work_queue.h"

namespace moesaic {

// Items that follow each other: neighbouring pairs of a slice of one expert.
struct ItemRun {
    std::int64_t first, end;  // items
    std::size_t slice;
    std::int64_t expert, pair;  // of the first item

    std::int64_t pair_of(std::int64_t item) const { return pair + item - first; }
};

class InnerItems {
  public:
    // `num_experts` experts, numbered from 0 on, with so many pairs in each slice; `ready`: those that were read ahead.
    InnerItems(std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
               std::span<const std::int64_t> ready, std::span<const int> threads_per_node);

    std::int64_t count() const { return runs_.empty() ? 0 : runs_.back().end; }
    const ItemRun& run_of(std::int64_t item) const;
    WorkQueue& queue() { return queue_; }

  private:
    void add_shares(std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
                    std::span<const std::int64_t> ready, std::span<const int> threads_per_node);
    void add(std::size_t slice, std::int64_t expert, std::int64_t pair, std::int64_t count);

    WorkQueue queue_;
    std::vector<ItemRun> runs_;
};

// The pairs of one expert that a thread reads ahead, and computes if the expert is chosen: runs whose items are the
// pairs of all slices, one slice after the other.
std::vector<ItemRun> pairs_to_read(std::span<const std::int64_t> pairs_of_slices, std::span<const int> threads_per_node,
                                   int thread);

}  // namespace moesaic
