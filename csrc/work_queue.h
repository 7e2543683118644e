// Hands out the items [0, num_items) of a loop to a team: each thread takes its own contiguous share in order, which
// keeps its reads sequential, and then single items from the ends of the others' shares.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace moesaic {

class WorkQueue {
  public:
    // Throws std::invalid_argument unless 0 <= num_items < 2^32.
    WorkQueue(std::int64_t num_items, int num_threads);

    // The next item for a thread, or -1 when all are taken.
    std::int64_t next(int thread) {
        std::int64_t item = take(shares_[thread], kFront);
        for (int i = 1; item < 0 && i < num_threads_; ++i) item = take(shares_[(thread + i) % num_threads_], kBack);
        return item;
    }

  private:
    enum End { kFront, kBack };
    struct alignas(64) Share {
        std::atomic<std::uint64_t> range{0};  // first item in the upper half, end in the lower
    };

    static std::int64_t take(Share& share, End end) {
        std::uint64_t range = share.range.load(std::memory_order_relaxed);
        for (;;) {
            const std::uint64_t first = range >> 32, last = range & 0xffffffffu;
            if (first >= last) return -1;
            const std::uint64_t rest = end == kFront ? (first + 1) << 32 | last : first << 32 | (last - 1);
            if (share.range.compare_exchange_weak(range, rest, std::memory_order_relaxed)) {
                return static_cast<std::int64_t>(end == kFront ? first : last - 1);
            }
        }
    }

    int num_threads_;
    std::unique_ptr<Share[]> shares_;
};

}  // namespace moesaic
