// A barrier for a team of threads that meet every few microseconds.
//
// In round r each thread tells the one 2^r places further that it has arrived, together with all that it has heard of,
// and waits to be told the same: after log2(threads) rounds everybody has heard of everybody. No word is written by two
// threads and none is polled by two, so that no cache line has a queue of cores behind it (Hensgen, Finkel and Manber,
// "Two algorithms for barrier synchronization", 1988).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "spin.h"

namespace moesaic {

class Barrier {
  public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {
        while ((std::int64_t{1} << num_rounds_) < num_threads) ++num_rounds_;
        words_ = std::make_unique<Word[]>(static_cast<std::size_t>(num_threads) * stride());
    }

    // Wait for all threads; `poll()` is called while waiting and may throw.
    template <class Poll>
    void wait(int thread, int patience, Poll&& poll) {
        const std::uint32_t turn = ++own(thread).turn;
        for (int round = 0; round < num_rounds_; ++round) {
            const int told = static_cast<int>((thread + (std::int64_t{1} << round)) % num_threads_);
            flag(told, round).store(turn, std::memory_order_release);
            // The teller may be one barrier ahead, never more.
            spin_until(patience, [&, &heard = flag(thread, round)] {
                poll();
                return static_cast<std::int32_t>(heard.load(std::memory_order_acquire) - turn) >= 0;
            });
        }
    }

    // Forget those who arrived at a barrier that others did not come to. Nobody may be waiting.
    void reset() {
        for (int thread = 0; thread < num_threads_; ++thread) {
            own(thread).turn = 0;
            for (int round = 0; round < num_rounds_; ++round) flag(thread, round).store(0, std::memory_order_relaxed);
        }
    }

  private:
    struct alignas(64) Word {
        std::atomic<std::uint32_t> flag{0};
        std::uint32_t turn = 0;  // barriers that this thread has come to; used in the first word of a thread only
    };

    // Words of a thread: its own, then one per round.
    std::size_t stride() const { return static_cast<std::size_t>(num_rounds_) + 1; }
    Word& own(int thread) { return words_[static_cast<std::size_t>(thread) * stride()]; }
    std::atomic<std::uint32_t>& flag(int thread, int round) { return (&own(thread))[round + 1].flag; }

    int num_threads_;
    int num_rounds_ = 0;
    std::unique_ptr<Word[]> words_;
};

}  // namespace moesaic
