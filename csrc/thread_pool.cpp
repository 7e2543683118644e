#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"

namespace moesaic {

namespace {

// A worker that finds no work spins this long, then sleeps: the gap between two layers is microseconds.
constexpr auto kSpinTime = std::chrono::milliseconds(2);
// Pauses before a waiting thread offers its core to others; bounds the loss when cores are oversubscribed.
constexpr int kPausesBeforeYield = 2000;

thread_local bool in_task = false;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until ready(); yields the core now and then.
template <class Ready>
void spin_until(Ready&& ready) {
    for (int pauses = 0; !ready();) {
        pause();
        if (++pauses >= kPausesBeforeYield) {
            sched_yield();
            pauses = 0;
        }
    }
}

// Thrown at a barrier when another thread of the team failed.
struct TeamAborted {};

}  // namespace

struct ThreadPool::State {
    explicit State(int n) : num_threads(n) {}

    int num_threads;
    std::mutex callers;  // one task at a time
    std::vector<std::thread> workers;

    alignas(64) std::atomic<std::uint32_t> epoch{0};  // grows by one per task; workers wait for it
    std::atomic<int> parked{0};
    std::atomic<bool> stop{false};
    void (*task)(void*, Team&) = nullptr;
    void* context = nullptr;

    alignas(64) std::atomic<int> running{0};  // workers that have not finished the task
    alignas(64) std::atomic<int> arrived{0};  // threads at the barrier
    alignas(64) std::atomic<std::uint32_t> barrier_epoch{0};
    alignas(64) std::atomic<bool> failed{false};
    std::mutex error_mutex;
    std::exception_ptr error;

    void work(ThreadPool* pool, int thread);
    void execute(Team& team);
    void fail(std::exception_ptr e);
    bool wait_for_task(std::uint32_t seen);
    void start_workers(ThreadPool* pool);
};

void ThreadPool::State::fail(std::exception_ptr e) {
    std::lock_guard lock(error_mutex);
    if (!error) error = std::move(e);
    failed.store(true, std::memory_order_release);
}

void ThreadPool::State::execute(Team& team) {
    in_task = true;
    try {
        task(context, team);
    } catch (const TeamAborted&) {
        // The thread that failed has stored its own exception.
    } catch (...) {
        fail(std::current_exception());
    }
    in_task = false;
}

// Wait until a task newer than `seen` is there: spin first, then sleep. False when the pool ends.
bool ThreadPool::State::wait_for_task(std::uint32_t seen) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    for (int pauses = 0; epoch.load(std::memory_order_acquire) == seen;) {
        pause();
        if (++pauses < kPausesBeforeYield) continue;
        pauses = 0;
        sched_yield();
        if (std::chrono::steady_clock::now() < deadline) continue;
        parked.fetch_add(1, std::memory_order_seq_cst);
        epoch.wait(seen, std::memory_order_seq_cst);
        parked.fetch_sub(1, std::memory_order_relaxed);
    }
    return !stop.load(std::memory_order_acquire);
}

void ThreadPool::State::work(ThreadPool* pool, int thread) {
    Team team(pool, thread, num_threads);
    for (std::uint32_t seen = 0; wait_for_task(seen); ++seen) {
        execute(team);
        running.fetch_sub(1, std::memory_order_release);
    }
}

void ThreadPool::State::start_workers(ThreadPool* pool) {
    for (int i = 1; i < num_threads; ++i) {
        workers.emplace_back([this, pool, i] { work(pool, i); });
    }
}

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>(num_threads)) { state_->start_workers(this); }

ThreadPool::~ThreadPool() {
    std::lock_guard lock(state_->callers);
    state_->stop.store(true, std::memory_order_release);
    state_->epoch.fetch_add(1, std::memory_order_seq_cst);
    state_->epoch.notify_all();
    for (auto& worker : state_->workers) worker.join();
}

int ThreadPool::num_threads() const { return state_->num_threads; }

void ThreadPool::run_erased(void (*task)(void*, Team&), void* context) {
    if (in_task || state_->num_threads == 1) {
        Team alone(nullptr, 0, 1);
        task(context, alone);
        return;
    }
    State& s = *state_;
    std::lock_guard lock(s.callers);
    s.task = task;
    s.context = context;
    s.error = nullptr;
    s.failed.store(false, std::memory_order_relaxed);
    s.arrived.store(0, std::memory_order_relaxed);
    s.running.store(s.num_threads - 1, std::memory_order_relaxed);
    s.epoch.fetch_add(1, std::memory_order_seq_cst);
    if (s.parked.load(std::memory_order_seq_cst) > 0) s.epoch.notify_all();
    Team team(this, 0, s.num_threads);
    s.execute(team);
    spin_until([&] { return s.running.load(std::memory_order_acquire) == 0; });
    if (s.error) std::rethrow_exception(s.error);
}

void Team::barrier() {
    if (pool_ == nullptr) return;
    ThreadPool::State& s = *pool_->state_;
    const std::uint32_t epoch = s.barrier_epoch.load(std::memory_order_acquire);
    if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
        s.arrived.store(0, std::memory_order_relaxed);
        s.barrier_epoch.fetch_add(1, std::memory_order_release);
        return;
    }
    spin_until([&] {
        if (s.failed.load(std::memory_order_acquire)) throw TeamAborted{};
        return s.barrier_epoch.load(std::memory_order_acquire) != epoch;
    });
}

namespace {

// The pools that were ever asked for, by number of threads. None is destroyed, so that a reference to one stays good
// while another thread changes the number; those not in use are asleep.
struct Pools {
    std::mutex mutex;
    std::map<int, std::unique_ptr<ThreadPool>> by_size;
    ThreadPool* current = nullptr;

    ThreadPool& use(int num_threads) {
        auto& pool = by_size[num_threads];
        if (!pool) pool = std::make_unique<ThreadPool>(num_threads);
        return *(current = pool.get());
    }
};

// Never destroyed either: threads may still use it while the process ends.
Pools* pools = nullptr;

Pools& pools_of_process() {
    static std::once_flag once;
    std::call_once(once, [] {
        pools = new Pools;
        // A forked child has the memory of the pools but not their threads: it leaves them alone and starts afresh.
        pthread_atfork(nullptr, nullptr, [] { pools = new Pools; });
    });
    return *pools;
}

}  // namespace

ThreadPool& thread_pool() {
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    return all.current != nullptr ? *all.current : all.use(num_usable_cores());
}

int num_threads() { return thread_pool().num_threads(); }

void set_num_threads(int num_threads) {
    if (num_threads < 1 || num_threads > 1024) {
        throw std::invalid_argument("number of threads is " + std::to_string(num_threads) + ": expected 1 to 1024");
    }
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    all.use(num_threads);
}

}  // namespace moesaic
