// A program that exits with 0 if the thread pool keeps its promises; run by test_native.py and by make sanitize. With
// the argument no-fork it leaves out what qemu-user cannot do: threads in a forked child.
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
#include "numa.h"
#include "thread_pool.h"

namespace {

using moesaic::NumaNode;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

double cpu_seconds() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

void every_item_once(moesaic::ThreadPool& pool) {
    std::vector<std::atomic<int>> counts(1000);
    pool.parallel_for(1000, 7, [&](std::int64_t begin, std::int64_t end) {
        for (auto i = begin; i < end; ++i) counts[static_cast<std::size_t>(i)]++;
    });
    for (auto& count : counts) require(count == 1, "every item runs once");
}

void phases(moesaic::ThreadPool& pool) {
    for (int round = 0; round < 200; ++round) {
        std::atomic<int> before{0};
        std::atomic<bool> early{false};
        pool.run([&](moesaic::Team& team) {
            for (int phase = 1; phase <= 3; ++phase) {
                before++;
                team.barrier();
                if (before < phase * team.num_threads()) early = true;
                team.barrier();
            }
        });
        require(!early, "a barrier waits for all");
    }
}

void errors_reach_the_caller(moesaic::ThreadPool& pool) {
    for (int thrower = 0; thrower < pool.num_threads(); ++thrower) {
        std::string message;
        try {
            pool.run([&](moesaic::Team& team) {
                if (team.thread() == thrower) throw std::runtime_error("thread " + std::to_string(thrower));
                team.barrier();
            });
        } catch (const std::runtime_error& error) {
            message = error.what();
        }
        require(message == "thread " + std::to_string(thrower), "the exception of a thread reaches the caller");
        every_item_once(pool);
        phases(pool);
    }
}

void nested(moesaic::ThreadPool& pool) {
    std::atomic<int> inner{0};
    pool.run([&](moesaic::Team&) { pool.run([&](moesaic::Team& alone) { inner += alone.num_threads(); }); });
    require(inner == pool.num_threads(), "a task inside a task runs alone");
}

void several_callers(moesaic::ThreadPool& pool) {
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&] {
            for (int round = 0; round < 50; ++round) every_item_once(pool);
        });
    }
    for (auto& caller : callers) caller.join();
}

void parks_when_idle(moesaic::ThreadPool& pool) {
    every_item_once(pool);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const double before = cpu_seconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    require(cpu_seconds() - before < 0.1, "an idle pool sleeps");
    every_item_once(pool);
}

void survives_fork() {
    moesaic::thread_pool().parallel_for(10, 1, [](std::int64_t, std::int64_t) {});
    const pid_t child = fork();
    if (child == 0) {
        moesaic::set_num_threads(3);
        every_item_once(moesaic::thread_pool());
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    require(status == 0, "a forked child gets a pool of its own");
}

// CPUs that the calling thread may run on.
std::vector<int> own_cpus() {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    sched_getaffinity(0, sizeof(mask), &mask);
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
    }
    return cpus;
}

std::vector<std::vector<int>> cpus_of_threads(moesaic::ThreadPool& pool) {
    std::vector<std::vector<int>> cpus(static_cast<std::size_t>(pool.num_threads()));
    pool.run([&](moesaic::Team& team) { cpus[static_cast<std::size_t>(team.thread())] = own_cpus(); });
    return cpus;
}

void threads_are_confined_to_cores() {
    const auto cores = moesaic::usable_cores();
    const auto all = own_cpus();
    const int num_cores = static_cast<int>(cores.size());
    moesaic::ThreadPool pinned(num_cores), free(num_cores, moesaic::numa_nodes(), false), crowded(2 * num_cores);
    const auto of_pinned = cpus_of_threads(pinned);
    for (std::size_t t = 1; t < of_pinned.size(); ++t) require(of_pinned[t] == cores[t], "a thread has its own core");
    require(of_pinned[0] == all, "the caller's affinity stays as it is");
    for (const auto& cpus : cpus_of_threads(free)) require(cpus == all, "threads are free where they should be");
    for (const auto& cpus : cpus_of_threads(crowded)) require(cpus == all, "more threads than cores are not confined");
    require(own_cpus() == all, "a pool leaves its maker's affinity alone");
}

void threads_are_divided_over_nodes() {
    const std::vector<NumaNode> uneven = {{-1, {{0}, {0}, {0}}}, {-1, {{0}}}};
    const auto division = [&](int num_threads) {
        return moesaic::ThreadPool(num_threads, uneven, true).threads_per_node();
    };
    require(division(4) == std::vector<int>{3, 1}, "as many threads as cores");
    require(division(8) == std::vector<int>{6, 2}, "twice as many");
    require(division(2) == std::vector<int>{2}, "fewer: spread over the cores");
    require(division(1) == std::vector<int>{1}, "one");
    for (int count : {1, 2, 3}) {
        moesaic::set_numa_nodes(count);
        require(moesaic::numa_nodes().size() == static_cast<std::size_t>(count), "as many nodes as pretended");
        for (const NumaNode& node : moesaic::numa_nodes()) {
            require(!node.cores.empty() && node.id == moesaic::kPretended, "a pretended node has a core");
        }
        moesaic::ThreadPool pool(6);
        require(pool.threads_per_node() == std::vector<int>(static_cast<std::size_t>(count), 6 / count), "even nodes");
        every_item_once(pool);
        phases(pool);
    }
    moesaic::set_numa_nodes(0);
}

// What the system says of the mapping that begins at an address: its memory policy, then details.
std::string policy_of(const void* address) {
    std::ifstream maps("/proc/self/numa_maps");
    char start[32];
    std::snprintf(start, sizeof(start), "%lx ", reinterpret_cast<unsigned long>(address));
    for (std::string line; std::getline(maps, line);) {
        if (line.starts_with(start)) return line.substr(std::string(start).size());
    }
    return "";
}

void memory_lies_where_it_is_put() {
    constexpr std::size_t kBytes = 8 << 20;
    const std::vector<NumaNode> real = {{0, moesaic::usable_cores()}, {0, moesaic::usable_cores()}};
    const std::vector<NumaNode> pretended = {{-1, {{0}}}, {-1, {{0}}}};
    const auto placed = [&](int index, const std::vector<NumaNode>& nodes) {
        void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        moesaic::place_memory(memory, kBytes, index, nodes);
        std::memset(memory, 1, kBytes);
        const std::string policy = policy_of(memory);
        munmap(memory, kBytes);
        return policy;
    };
    const std::string bound = placed(1, real);
    if (bound.empty()) return;  // a kernel without nodes, or an emulator that has its own addresses
    require(bound.starts_with("bind:0") || bound.starts_with("default"), "bound, or touched where that is forbidden");
    const std::string spread = placed(-1, real);
    require(spread.starts_with("interleave:0") || spread.starts_with("default"), "spread over the nodes");
    require(placed(1, pretended).find("bind") == std::string::npos, "pretended nodes bind nothing");
    bool refused = false;
    try {
        moesaic::place_memory(nullptr, 0, 2, real);
    } catch (const std::out_of_range&) {
        refused = true;
    }
    require(refused, "a node that is not there is refused");
}

// A pool of the process keeps its settings apart from those of the next one.
void settings_hold_from_the_next_call_on() {
    moesaic::ThreadPool& before = moesaic::thread_pool();
    moesaic::set_num_threads(4);
    moesaic::set_num_nodes(2);
    moesaic::ThreadPool& two = moesaic::thread_pool();
    require(two.threads_per_node() == std::vector<int>({2, 2}) && two.num_threads() == 4, "threads of two nodes");
    moesaic::set_num_nodes(0);
    moesaic::set_pinning(false);
    require(&moesaic::thread_pool() != &two, "another pool for other settings");
    moesaic::set_pinning(true);
    every_item_once(two);
    every_item_once(before);
}

}  // namespace

int main(int argc, char** argv) {
    for (int num_threads : {1, 2, 7}) {
        moesaic::ThreadPool pool(num_threads);
        require(pool.num_threads() == num_threads, "the pool has the threads asked for");
        every_item_once(pool);
        phases(pool);
        errors_reach_the_caller(pool);
        nested(pool);
        several_callers(pool);
        parks_when_idle(pool);
    }
    threads_are_confined_to_cores();
    threads_are_divided_over_nodes();
    memory_lies_where_it_is_put();
    settings_hold_from_the_next_call_on();
    if (argc < 2 || std::strcmp(argv[1], "no-fork") != 0) survives_fork();
    return 0;
}
