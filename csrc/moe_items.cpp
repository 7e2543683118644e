#include "moe_items.h"

#include <algorithm>

namespace moesaic {

namespace {

WorkQueue queue_of(std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
                   std::span<const int> threads_per_node) {
    std::vector<std::int64_t> items(pairs_of_slices.begin(), pairs_of_slices.end());
    for (std::int64_t& count : items) count *= num_experts;
    return WorkQueue(group_work(items, threads_per_node));
}

// What a thread's share of such a queue consists of, expert by expert.
template <class Visit>
void visit_share(WorkQueue::Range share, std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
                 Visit&& visit) {
    std::int64_t first = 0;  // item of the slice's expert
    for (std::size_t slice = 0; slice < pairs_of_slices.size(); ++slice) {
        const std::int64_t num_pairs = pairs_of_slices[slice];
        for (std::int64_t expert = 0; expert < num_experts; ++expert, first += num_pairs) {
            const std::int64_t begin = std::max(share.begin, first), end = std::min(share.end, first + num_pairs);
            if (begin < end) visit(slice, expert, begin - first, end - begin);
        }
    }
}

}  // namespace

InnerItems::InnerItems(std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
                       std::span<const std::int64_t> ready, std::span<const int> threads_per_node)
    : queue_(queue_of(pairs_of_slices, num_experts, threads_per_node)) {
    if (!ready.empty()) {
        add_shares(pairs_of_slices, num_experts, ready, threads_per_node);
        return;
    }
    for (std::size_t slice = 0; slice < pairs_of_slices.size(); ++slice) {
        for (std::int64_t expert = 0; expert < num_experts; ++expert) add(slice, expert, 0, pairs_of_slices[slice]);
    }
}

void InnerItems::add_shares(std::span<const std::int64_t> pairs_of_slices, std::int64_t num_experts,
                            std::span<const std::int64_t> ready, std::span<const int> threads_per_node) {
    std::vector<std::int64_t> others;
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
        if (std::find(ready.begin(), ready.end(), expert) == ready.end()) others.push_back(expert);
    }
    const auto num_others = static_cast<std::int64_t>(others.size());
    const WorkQueue of_ready = queue_of(pairs_of_slices, 1, threads_per_node);
    const WorkQueue of_others = queue_of(pairs_of_slices, num_others, threads_per_node);
    int num_threads = 0;
    for (const int threads : threads_per_node) num_threads += threads;
    for (int thread = 0; thread < num_threads; ++thread) {
        const std::int64_t begin = count();
        for (const std::int64_t expert : ready) {
            visit_share(of_ready.share(thread), pairs_of_slices, 1,
                        [&](std::size_t slice, std::int64_t, std::int64_t pair, std::int64_t num_pairs) {
                            add(slice, expert, pair, num_pairs);
                        });
        }
        visit_share(of_others.share(thread), pairs_of_slices, num_others,
                    [&](std::size_t slice, std::int64_t other, std::int64_t pair, std::int64_t num_pairs) {
                        add(slice, others[static_cast<std::size_t>(other)], pair, num_pairs);
                    });
        queue_.give(thread, begin, count());
    }
}

void InnerItems::add(std::size_t slice, std::int64_t expert, std::int64_t pair, std::int64_t num_pairs) {
    const std::int64_t first = count();
    if (num_pairs > 0) runs_.push_back({first, first + num_pairs, slice, expert, pair});
}

const ItemRun& InnerItems::run_of(std::int64_t item) const {
    return *std::upper_bound(runs_.begin(), runs_.end(), item,
                             [](std::int64_t wanted, const ItemRun& run) { return wanted < run.end; });
}

std::vector<ItemRun> pairs_to_read(std::span<const std::int64_t> pairs_of_slices, std::span<const int> threads_per_node,
                                   int thread) {
    std::vector<ItemRun> runs;
    const WorkQueue queue = queue_of(pairs_of_slices, 1, threads_per_node);
    std::int64_t first = 0;
    visit_share(queue.share(thread), pairs_of_slices, 1,
                [&](std::size_t slice, std::int64_t, std::int64_t pair, std::int64_t count) {
                    runs.push_back({first, first + count, slice, 0, pair});
                    first += count;
                });
    return runs;
}

}  // namespace moesaic
