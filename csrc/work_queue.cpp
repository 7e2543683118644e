#include "work_queue.h"

#include <algorithm>
#include <stdexcept>

namespace moesaic {

std::vector<WorkGroup> group_work(std::span<const std::int64_t> items_of_parts, std::span<const int> threads_of_nodes) {
    const std::size_t num_groups = std::min(items_of_parts.size(), threads_of_nodes.size());
    std::vector<WorkGroup> groups(num_groups, WorkGroup{0, 0});
    for (std::size_t p = 0; p < items_of_parts.size(); ++p) {
        groups[p * num_groups / items_of_parts.size()].num_items += items_of_parts[p];
    }
    for (std::size_t n = 0; n < threads_of_nodes.size(); ++n) {
        groups[n * num_groups / threads_of_nodes.size()].num_threads += threads_of_nodes[n];
    }
    return groups;
}

WorkQueue::WorkQueue(std::int64_t num_items, int num_threads) : num_threads_(num_threads) {
    const WorkGroup all{num_items, num_threads};
    divide({&all, 1});
}

WorkQueue::WorkQueue(std::span<const WorkGroup> groups) : num_threads_(0) {
    for (const WorkGroup& group : groups) num_threads_ += group.num_threads;
    divide(groups);
}

void WorkQueue::divide(std::span<const WorkGroup> groups) {
    std::int64_t total = 0;
    for (const WorkGroup& group : groups) {
        if (group.num_items < 0 || group.num_items > 0xffffffffll)
            throw std::invalid_argument("too many items for one job");
        total += group.num_items;
    }
    if (total > 0xffffffffll) throw std::invalid_argument("too many items for one job");
    shares_ = std::make_unique<Share[]>(static_cast<std::size_t>(num_threads_));
    std::int64_t first_item = 0;
    int first_thread = 0;
    for (const WorkGroup& group : groups) {
        for (std::int64_t i = 0; i < group.num_threads; ++i) {
            Share& share = shares_[static_cast<std::size_t>(first_thread + i)];
            const auto first = static_cast<std::uint64_t>(first_item + group.num_items * i / group.num_threads);
            const auto end = static_cast<std::uint64_t>(first_item + group.num_items * (i + 1) / group.num_threads);
            share.range.store(first << 32 | end, std::memory_order_relaxed);
            share.group_begin = first_thread;
            share.group_end = first_thread + group.num_threads;
        }
        first_item += group.num_items;
        first_thread += group.num_threads;
    }
}

}  // namespace moesaic
