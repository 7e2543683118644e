#include "work_queue.h"

#include <stdexcept>

namespace moesaic {

WorkQueue::WorkQueue(std::int64_t num_items, int num_threads)
    : num_threads_(num_threads), shares_(std::make_unique<Share[]>(static_cast<std::size_t>(num_threads))) {
    if (num_items < 0 || num_items > 0xffffffffll) throw std::invalid_argument("too many items for one job");
    for (std::int64_t i = 0; i < num_threads; ++i) {
        const auto first = static_cast<std::uint64_t>(num_items * i / num_threads);
        const auto end = static_cast<std::uint64_t>(num_items * (i + 1) / num_threads);
        shares_[static_cast<std::size_t>(i)].range.store(first << 32 | end, std::memory_order_relaxed);
    }
}

}  // namespace moesaic
