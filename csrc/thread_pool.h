// A persistent team of threads that spins during a step and parks when idle.
//
//   thread_pool().run([&](Team& team) {           // on every thread, the caller's included
//       for (int i; (i = items.next()) >= 0;) ... // dynamic work: Counter
//       team.barrier();                           // between phases
//       ...
//   });
//
// Threads are divided over the memory nodes of numa.h, neighbours on one node, and each but the first is confined to a
// core of its own if there are enough; the first is the caller's, whose affinity is the caller's business.
//
// An exception in any thread stops the others at their next barrier and is rethrown by run(). Callers of several
// threads are served one after the other. A call made from inside a task runs on that one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "numa.h"

namespace moesaic {

class ThreadPool;

// One thread's view of the team that runs a task.
class Team {
  public:
    int thread() const { return thread_; }
    int num_threads() const { return num_threads_; }
    // Wait until every thread of the team is here.
    void barrier() {
        barrier([](void*) {}, nullptr);
    }
    // The same; idle() is called again and again meanwhile and should take no longer than a fraction of a microsecond.
    template <class Idle>
    void barrier(Idle& idle) {
        barrier([](void* context) { (*static_cast<Idle*>(context))(); }, &idle);
    }

  private:
    friend class ThreadPool;
    void barrier(void (*idle)(void*), void* context);
    Team(ThreadPool* pool, int thread, int num_threads) : pool_(pool), thread_(thread), num_threads_(num_threads) {}
    ThreadPool* pool_;  // null: a team of one
    int thread_;
    int num_threads_;
};

// Hands out the ranges [begin, end) of a loop to whichever thread asks next.
class Counter {
  public:
    explicit Counter(std::int64_t size, std::int64_t chunk = 1) : size_(size), chunk_(chunk) {}
    // False when nothing is left.
    bool next(std::int64_t& begin, std::int64_t& end) {
        begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
        end = begin + chunk_ < size_ ? begin + chunk_ : size_;
        return begin < size_;
    }

  private:
    alignas(64) std::atomic<std::int64_t> next_{0};
    std::int64_t size_, chunk_;
};

class ThreadPool {
  public:
    // Threads on the cores of `nodes`, confined to them if `pin` and there are at least as many cores.
    ThreadPool(int num_threads, const std::vector<NumaNode>& nodes, bool pin);
    explicit ThreadPool(int num_threads) : ThreadPool(num_threads, numa_nodes(), true) {}
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const;
    // Those of each node that has any, in order: threads 0 to threads_per_node()[0] - 1 are on the first.
    const std::vector<int>& threads_per_node() const;

    // Run task(Team&) once on every thread and return when all are done.
    template <class Task>
    void run(Task&& task) {
        run_erased([](void* t, Team& team) { (*static_cast<std::remove_reference_t<Task>*>(t))(team); }, &task);
    }

    // body(begin, end) over [0, size) in chunks; what is one chunk runs in the calling thread and wakes nobody.
    template <class Body>
    void parallel_for(std::int64_t size, std::int64_t chunk, Body&& body) {
        if (size <= chunk) {
            if (size > 0) body(std::int64_t{0}, size);
            return;
        }
        Counter counter(size, chunk);
        run([&](Team&) {
            for (std::int64_t begin, end; counter.next(begin, end);) body(begin, end);
        });
    }

  private:
    friend class Team;
    void run_erased(void (*task)(void*, Team&), void* context);
    struct State;
    std::unique_ptr<State> state_;
};

// The pool of this process, made on first use with the usable cores; the reference stays good for ever.
ThreadPool& thread_pool();
int num_threads();
// Use another number of threads from the next call on. Throws std::invalid_argument unless 1 <= num_threads <= 1024.
void set_num_threads(int num_threads);
// set_numa_nodes(count) of numa.h, and threads divided like that from the next call on.
void set_num_nodes(int count);
// Whether threads are confined to cores, from the next call on; they are unless this says otherwise.
void set_pinning(bool pin);

}  // namespace moesaic
