#include "cpu.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <set>

namespace moesaic {

#if defined(__x86_64__)

// __builtin_cpu_supports wants a literal, and checks that the system saves the registers too.
#define MOESAIC_CPU_FEATURES(X) \
    X("avx2")                   \
    X("fma")                    \
    X("f16c")                   \
    X("avx512f")                \
    X("avx512bw")               \
    X("avx512dq")               \
    X("avx512vl")               \
    X("avx512vnni")             \
    X("avx512vbmi")             \
    X("avx512bf16")

std::vector<std::pair<std::string, bool>> cpu_features() {
    __builtin_cpu_init();
    std::vector<std::pair<std::string, bool>> features;
#define X(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0);
    MOESAIC_CPU_FEATURES(X)
#undef X
    return features;
}

bool cpu_supports_isa(const char* name) {
    const auto features = cpu_features();
    auto all_of = [&](std::initializer_list<const char*> wanted) {
        return std::all_of(wanted.begin(), wanted.end(), [&](const char* feature) {
            return std::find(features.begin(), features.end(), std::pair<std::string, bool>(feature, true)) !=
                   features.end();
        });
    };
    if (std::strcmp(name, "generic") == 0) return true;
    if (std::strcmp(name, "avx2") == 0) return all_of({"avx2", "fma", "f16c"});
    if (std::strcmp(name, "avx512") == 0) {
        return all_of({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"});
    }
    return false;
}

#else

std::vector<std::pair<std::string, bool>> cpu_features() { return {}; }

bool cpu_supports_isa(const char* name) { return std::strcmp(name, "generic") == 0; }

#endif

namespace {

// The cores of the affinity mask; two hyperthreads of one core count once because both wait for the same memory.
int num_cores_in_affinity() {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof(mask), &mask) != 0) {
        return static_cast<int>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &mask)) continue;
        std::string siblings;
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
        cores.insert(siblings);
    }
    return std::max<int>(1, static_cast<int>(cores.size()));
}

// CPUs that the cgroup (version 2) grants, rounded up; a very large number without a limit.
int cgroup_quota() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    long long quota = 0, period = 0;
    if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 1 << 20;
    return static_cast<int>(std::min<long long>((quota + period - 1) / period, 1 << 20));
}

}  // namespace

int num_usable_cores() { return std::max(1, std::min(num_cores_in_affinity(), cgroup_quota())); }

}  // namespace moesaic
