// Hands out the items [0, num_items) of a loop to a team: each thread takes its own contiguous share in order, which
// keeps its reads sequential, and then from the ends of the others' shares, those of its own group first.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace moesaic {

// Items that lie one after the other and the threads, also neighbours, whose memory they are nearest to.
struct WorkGroup {
    std::int64_t num_items;
    int num_threads;
};

// Groups for work in parts (part p lies on node p) on a team whose threads are divided over nodes: as many as there are
// of both. If there are fewer parts, neighbouring nodes share one; if more, a node has several.
std::vector<WorkGroup> group_work(std::span<const std::int64_t> items_of_parts, std::span<const int> threads_of_nodes);

class WorkQueue {
  public:
    // Throws std::invalid_argument unless 0 <= number of items < 2^32.
    WorkQueue(std::int64_t num_items, int num_threads);
    explicit WorkQueue(std::span<const WorkGroup> groups);

    // Items [begin, end) as the thread's own share, for a team that meets between two uses of a queue: nobody may be
    // taking items of the last use. Others take of it as soon as it is there.
    void give(int thread, std::int64_t begin, std::int64_t end) {
        shares_[thread].range.store(static_cast<std::uint64_t>(begin) << 32 | static_cast<std::uint64_t>(end),
                                    std::memory_order_relaxed);
    }

    // The next item for a thread, or -1 when all are taken.
    std::int64_t next(int thread) {
        Range range;
        return next(thread, 1, range) ? range.begin : -1;
    }

    // Up to `most` items that follow each other; false when all are taken.
    struct Range {
        std::int64_t begin, end;
    };
    bool next(int thread, int most, Range& range) {
        const Share& own = shares_[thread];
        if (take(shares_[thread], kFront, most, range)) return true;
        for (int i = thread + 1; i < own.group_end; ++i) {
            if (take(shares_[i], kBack, most, range)) return true;
        }
        for (int i = own.group_begin; i < thread; ++i) {
            if (take(shares_[i], kBack, most, range)) return true;
        }
        for (int i = 0; i < num_threads_ - (own.group_end - own.group_begin); ++i) {
            if (take(shares_[(own.group_end + i) % num_threads_], kBack, most, range)) return true;
        }
        return false;
    }

    // The same, of the thread's own share at most one of so many parts of what is left, but `least`: the fewer are
    // left, the fewer it takes, so that others can help a slow one.
    bool next_part(int thread, int parts, int least, int most, Range& range) {
        const Range own = share(thread);
        const std::int64_t left = own.end - own.begin, wanted = left / parts / least * least;
        const std::int64_t count = left <= 0 ? most : wanted < least ? least : wanted < most ? wanted : most;
        return next(thread, static_cast<int>(count), range);
    }

    // What is left of a thread's share: before anybody took anything, all of it.
    Range share(int thread) const {
        const std::uint64_t range = shares_[thread].range.load(std::memory_order_relaxed);
        return {static_cast<std::int64_t>(range >> 32), static_cast<std::int64_t>(range & 0xffffffffu)};
    }

  private:
    enum End { kFront, kBack };
    struct alignas(64) Share {
        std::atomic<std::uint64_t> range{0};  // first item in the upper half, end in the lower
        int group_begin = 0, group_end = 0;   // the threads of its group
    };

    void divide(std::span<const WorkGroup> groups);

    static bool take(Share& share, End end, int most, Range& taken) {
        std::uint64_t range = share.range.load(std::memory_order_relaxed);
        for (;;) {
            const std::uint64_t first = range >> 32, last = range & 0xffffffffu;
            if (first >= last) return false;
            // A thief leaves at least half to the owner, who is in the middle of it.
            const std::uint64_t available = end == kFront ? last - first : (last - first + 1) / 2;
            const std::uint64_t count = available < static_cast<std::uint64_t>(most) ? available : most;
            const std::uint64_t rest = end == kFront ? (first + count) << 32 | last : first << 32 | (last - count);
            if (share.range.compare_exchange_weak(range, rest, std::memory_order_relaxed)) {
                taken.begin = static_cast<std::int64_t>(end == kFront ? first : last - count);
                taken.end = taken.begin + static_cast<std::int64_t>(count);
                return true;
            }
        }
    }

    int num_threads_;
    std::unique_ptr<Share[]> shares_;
};

}  // namespace moesaic
