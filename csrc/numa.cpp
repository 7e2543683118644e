#include "numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu.h"

namespace moesaic {

namespace {

constexpr int kMaxNodes = 64;  // bits of a node mask
// Of <linux/mempolicy.h>, which need not be installed where this is built.
constexpr int kPolicyBind = 2, kPolicyInterleave = 3;

std::atomic<int> pretended_nodes{0};

// Node of a CPU: its folder holds a link called node<N>.
int node_of(int cpu) {
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/node";
    for (int node = 0; node < kMaxNodes; ++node) {
        if (access((folder + std::to_string(node)).c_str(), F_OK) == 0) return node;
    }
    return 0;
}

std::vector<NumaNode> divide(const std::vector<std::vector<int>>& cores) {
    std::vector<NumaNode> nodes;
    for (const auto& core : cores) {
        const int id = node_of(core.front());
        auto at = std::find_if(nodes.begin(), nodes.end(), [&](const NumaNode& node) { return node.id == id; });
        if (at == nodes.end()) at = nodes.insert(nodes.end(), {id, {}});
        at->cores.push_back(core);
    }
    std::sort(nodes.begin(), nodes.end(), [](const NumaNode& a, const NumaNode& b) { return a.id < b.id; });
    if (nodes.size() == 1) nodes.front().id = kPretended;
    return nodes;
}

std::vector<NumaNode> nodes_of_system() {
    static std::mutex mutex;
    static std::vector<std::vector<int>> known;
    static std::vector<NumaNode> nodes;  // of the cores `known`
    const auto cores = usable_cores();
    std::lock_guard lock(mutex);
    if (cores != known) nodes = divide(cores);
    known = cores;
    return nodes;
}

std::vector<NumaNode> pretend(std::size_t count) {
    const auto cores = usable_cores();
    std::vector<NumaNode> nodes;
    for (std::size_t n = 0; n < count; ++n) {
        const std::size_t begin = n * cores.size() / count;
        const std::size_t end = std::max(begin + 1, (n + 1) * cores.size() / count);
        nodes.push_back(
            {kPretended,
             {cores.begin() + static_cast<std::ptrdiff_t>(begin), cores.begin() + static_cast<std::ptrdiff_t>(end)}});
    }
    return nodes;
}

bool set_policy(void* address, std::size_t num_bytes, int policy, unsigned long nodes) {
    return syscall(SYS_mbind, address, num_bytes, policy, &nodes, 8 * sizeof(nodes) + 1, 0) == 0;
}

// A page is put on the node of the thread that writes to it first.
void touch_on(const NumaNode& node, void* address, std::size_t num_bytes) {
    std::vector<int> cpus;
    for (const auto& core : node.cores) cpus.insert(cpus.end(), core.begin(), core.end());
    std::thread([&] {
        confine_thread(cpus);
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        for (std::size_t at = 0; at < num_bytes; at += page) static_cast<volatile char*>(address)[at] = 0;
    }).join();
}

}  // namespace

std::vector<NumaNode> numa_nodes() {
    const int count = pretended_nodes.load(std::memory_order_relaxed);
    return count == 0 ? nodes_of_system() : pretend(static_cast<std::size_t>(count));
}

void set_numa_nodes(int count) {
    if (count < 0 || count > kMaxNodes) {
        throw std::invalid_argument("number of NUMA nodes is " + std::to_string(count) + ": expected 0 to " +
                                    std::to_string(kMaxNodes));
    }
    pretended_nodes.store(count, std::memory_order_relaxed);
}

void place_memory(void* address, std::size_t num_bytes, int index, const std::vector<NumaNode>& nodes) {
    if (index < -1 || index >= static_cast<int>(nodes.size())) {
        throw std::out_of_range("NUMA node " + std::to_string(index) + " of " + std::to_string(nodes.size()));
    }
    if (nodes.front().id == kPretended) return;
    if (index >= 0) {
        const NumaNode& node = nodes[static_cast<std::size_t>(index)];
        if (!set_policy(address, num_bytes, kPolicyBind, 1ul << node.id)) touch_on(node, address, num_bytes);
        return;
    }
    unsigned long mask = 0;
    for (const NumaNode& node : nodes) mask |= 1ul << node.id;
    // Refused: pages then go to the nodes of the threads that write them, which also is a spread of a kind.
    set_policy(address, num_bytes, kPolicyInterleave, mask);
}

bool confine_thread(const std::vector<int>& cpus) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    for (const int cpu : cpus) CPU_SET(cpu, &mask);
    return sched_setaffinity(0, sizeof(mask), &mask) == 0;
}

}  // namespace moesaic
