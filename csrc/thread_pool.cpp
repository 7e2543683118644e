#include "thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "barrier.h"
#include "cpu.h"
#include "spin.h"

namespace moesaic {

namespace {

// A worker that finds no work spins this long, then sleeps: the gap between two layers is microseconds.
constexpr auto kSpinTime = std::chrono::milliseconds(2);

thread_local bool in_task = false;

// Thrown at a barrier when another thread of the team failed.
struct TeamAborted {};

// Where a thread belongs: a node, and a core there.
struct Seat {
    std::size_t node;
    std::vector<int> cpus;
};

// Seats of all threads, spread evenly over the cores, neighbours on the same node.
std::vector<Seat> seats_of(int num_threads, const std::vector<NumaNode>& nodes) {
    std::vector<Seat> cores, seats;
    for (std::size_t n = 0; n < nodes.size(); ++n) {
        for (const auto& cpus : nodes[n].cores) cores.push_back({n, cpus});
    }
    const auto count = static_cast<std::size_t>(num_threads);
    for (std::size_t t = 0; t < count; ++t) seats.push_back(cores[t * cores.size() / count]);
    return seats;
}

std::size_t num_cores(const std::vector<NumaNode>& nodes) {
    std::set<int> first_cpus;  // pretended nodes may share cores
    for (const NumaNode& node : nodes) {
        for (const auto& cpus : node.cores) first_cpus.insert(cpus.front());
    }
    return first_cpus.size();
}

}  // namespace

// What different threads write lies on cache lines apart.
struct ThreadPool::State {
    State(int n, const std::vector<NumaNode>& nodes, bool pin);

    int num_threads;
    int patience;  // pauses before a waiting thread offers its core
    std::vector<Seat> seats;
    std::vector<int> threads_per_node;
    std::vector<std::thread> workers;

    alignas(64) std::mutex callers;  // one task at a time

    // One line, which idle workers poll: they have the task when they see the epoch.
    alignas(64) std::atomic<std::uint32_t> epoch{0};  // grows by one per task
    std::atomic<bool> stop{false};
    void (*task)(void*, Team&) = nullptr;
    void* context = nullptr;

    alignas(64) std::atomic<int> parked{0};

    struct alignas(64) Done {
        std::atomic<std::uint32_t> epoch{0};  // of the last task that the worker has finished
    };
    std::unique_ptr<Done[]> done;  // of each thread
    Barrier barrier;

    alignas(64) std::atomic<bool> failed{false};
    std::mutex error_mutex;
    std::exception_ptr error;

    void work(ThreadPool* pool, int thread);
    void execute(Team& team);
    void fail(std::exception_ptr e);
    bool wait_for_task(std::uint32_t seen);
    void start_workers(ThreadPool* pool);
    void rethrow_error();
};

ThreadPool::State::State(int n, const std::vector<NumaNode>& nodes, bool pin)
    : num_threads(n),
      seats(seats_of(n, nodes)),
      done(std::make_unique<Done[]>(static_cast<std::size_t>(n))),
      barrier(n) {
    const bool own_cores = static_cast<std::size_t>(n) <= num_cores(nodes);
    patience = own_cores ? kPausesWithOwnCore : kPausesWithSharedCore;
    for (std::size_t t = 0; t < seats.size(); ++t) {
        if (t == 0 || seats[t].node != seats[t - 1].node) threads_per_node.push_back(0);
        ++threads_per_node.back();
        if (!pin || !own_cores) seats[t].cpus.clear();
    }
}

void ThreadPool::State::fail(std::exception_ptr e) {
    std::lock_guard lock(error_mutex);
    if (!error) error = std::move(e);
    failed.store(true, std::memory_order_release);
}

// After a task that failed, which some threads left before others: all as if it had not been.
void ThreadPool::State::rethrow_error() {
    barrier.reset();
    failed.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error, nullptr));
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
    std::chrono::steady_clock::time_point deadline{};
    for (int pauses = 0; epoch.load(std::memory_order_acquire) == seen;) {
        pause();
        if (++pauses < patience) continue;
        pauses = 0;
        sched_yield();
        const auto now = std::chrono::steady_clock::now();
        if (deadline.time_since_epoch().count() == 0) deadline = now + kSpinTime;
        if (now < deadline) continue;
        parked.fetch_add(1, std::memory_order_seq_cst);
        epoch.wait(seen, std::memory_order_seq_cst);
        parked.fetch_sub(1, std::memory_order_relaxed);
    }
    return !stop.load(std::memory_order_acquire);
}

void ThreadPool::State::work(ThreadPool* pool, int thread) {
    const auto index = static_cast<std::size_t>(thread);
    if (!seats[index].cpus.empty()) confine_thread(seats[index].cpus);  // a wish: a container may forbid it
    Team team(pool, thread, num_threads);
    for (std::uint32_t seen = 0; wait_for_task(seen); ++seen) {
        execute(team);
        done[index].epoch.store(seen + 1, std::memory_order_release);
    }
}

void ThreadPool::State::start_workers(ThreadPool* pool) {
    for (int i = 1; i < num_threads; ++i) {
        workers.emplace_back([this, pool, i] { work(pool, i); });
    }
}

ThreadPool::ThreadPool(int num_threads, const std::vector<NumaNode>& nodes, bool pin)
    : state_(std::make_unique<State>(num_threads, nodes, pin)) {
    state_->start_workers(this);
}

ThreadPool::~ThreadPool() {
    std::lock_guard lock(state_->callers);
    state_->stop.store(true, std::memory_order_release);
    state_->epoch.fetch_add(1, std::memory_order_seq_cst);
    state_->epoch.notify_all();
    for (auto& worker : state_->workers) worker.join();
}

int ThreadPool::num_threads() const { return state_->num_threads; }

const std::vector<int>& ThreadPool::threads_per_node() const { return state_->threads_per_node; }

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
    const std::uint32_t epoch = s.epoch.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (s.parked.load(std::memory_order_seq_cst) > 0) s.epoch.notify_all();
    Team team(this, 0, s.num_threads);
    s.execute(team);
    for (std::size_t t = 1; t < static_cast<std::size_t>(s.num_threads); ++t) {
        spin_until(s.patience, [&] { return s.done[t].epoch.load(std::memory_order_acquire) == epoch; });
    }
    if (s.failed.load(std::memory_order_relaxed)) s.rethrow_error();
}

void Team::barrier(void (*idle)(void*), void* context) {
    if (pool_ == nullptr) return;
    ThreadPool::State& s = *pool_->state_;
    s.barrier.wait(thread_, s.patience, [&] {
        idle(context);
        if (s.failed.load(std::memory_order_acquire)) throw TeamAborted{};
    });
}

namespace {

// The pools that were ever asked for, by what was asked. None is destroyed, so that a reference to one stays good while
// another thread changes the settings; those not in use are asleep.
struct Pools {
    std::mutex mutex;
    int num_threads = 0;  // 0: the usable cores
    int num_nodes = 0;    // 0: those of the system
    bool pin = true;
    std::map<std::tuple<int, int, bool>, std::unique_ptr<ThreadPool>> by_settings;
    ThreadPool* current = nullptr;  // null: not made since the settings changed

    ThreadPool& use() {
        if (current != nullptr) return *current;
        if (num_threads == 0) num_threads = num_usable_cores();
        auto& pool = by_settings[{num_threads, num_nodes, pin}];
        if (!pool) pool = std::make_unique<ThreadPool>(num_threads, numa_nodes(), pin);
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
        pthread_atfork(nullptr, nullptr, [] {
            auto* own = new Pools;
            own->num_threads = pools->num_threads;
            own->num_nodes = pools->num_nodes;
            own->pin = pools->pin;
            pools = own;
        });
    });
    return *pools;
}

}  // namespace

ThreadPool& thread_pool() {
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    return all.use();
}

int num_threads() { return thread_pool().num_threads(); }

void set_num_threads(int num_threads) {
    if (num_threads < 1 || num_threads > 1024) {
        throw std::invalid_argument("number of threads is " + std::to_string(num_threads) + ": expected 1 to 1024");
    }
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    all.num_threads = num_threads;
    all.current = nullptr;
}

void set_num_nodes(int count) {
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    set_numa_nodes(count);
    all.num_nodes = count;
    all.current = nullptr;
}

void set_pinning(bool pin) {
    Pools& all = pools_of_process();
    std::lock_guard lock(all.mutex);
    all.pin = pin;
    all.current = nullptr;
}

}  // namespace moesaic
