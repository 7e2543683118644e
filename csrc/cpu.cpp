#include "cpu.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

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
    X("avx512bitalg")           \
    X("gfni")                   \
    X("avx512bf16")             \
    X("avxvnni")

namespace {

// AMX's int8 and bf16 tiles: the processor has them, and Linux lets this process use their state, which it asks for
// once.
bool has_amx() {
    static const bool found = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        constexpr unsigned kTileBits = 1u << 22 | 1u << 24 | 1u << 25;  // amx-bf16, amx-tile, amx-int8
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBits) != kTileBits) return false;
        constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return found;
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
    __builtin_cpu_init();
    std::vector<std::pair<std::string, bool>> features;
#define X(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0);
    MOESAIC_CPU_FEATURES(X)
#undef X
    features.emplace_back("amx", has_amx());
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
    const bool avx2 = all_of({"avx2", "fma", "f16c"});
    const bool avx512 = avx2 && all_of({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"});
    if (std::strcmp(name, "avx2") == 0) return avx2;
    if (std::strcmp(name, "avxvnni") == 0) return avx2 && all_of({"avxvnni"});
    if (std::strcmp(name, "avx512") == 0) return avx512;
    const bool avx512_vbmi = avx512 && all_of({"avx512vbmi", "avx512bitalg", "gfni"});
    if (std::strcmp(name, "avx512_vbmi") == 0) return avx512_vbmi;
    if (std::strcmp(name, "amx") == 0) return avx512_vbmi && all_of({"avx512bf16", "amx"});
    return false;
}

#else

std::vector<std::pair<std::string, bool>> cpu_features() { return {}; }

bool cpu_supports_isa(const char* name) { return std::strcmp(name, "generic") == 0; }

#endif

namespace {

// CPUs that the cgroup (version 2) grants, rounded up; a very large number without a limit.
int cgroup_quota() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    long long quota = 0, period = 0;
    if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 1 << 20;
    return static_cast<int>(std::min<long long>((quota + period - 1) / period, 1 << 20));
}

// Of the main thread: those of workers are narrower.
cpu_set_t affinity_mask() {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(getpid(), sizeof(mask), &mask) != 0) {
        for (long cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN) && cpu < CPU_SETSIZE; ++cpu) CPU_SET(cpu, &mask);
    }
    return mask;
}

std::vector<std::vector<int>> cores_of(const cpu_set_t& mask) {
    std::map<std::string, std::size_t> index;  // of the core, by the list of its CPUs
    std::vector<std::vector<int>> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &mask)) continue;
        std::string siblings;
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        if (!std::getline(file, siblings)) siblings = "cpu" + std::to_string(cpu);
        const auto [at, is_new] = index.emplace(siblings, cores.size());
        if (is_new) cores.emplace_back();
        cores[at->second].push_back(cpu);
    }
    return cores;
}

}  // namespace

std::vector<std::vector<int>> usable_cores() {
    static std::mutex mutex;
    static cpu_set_t known;
    static std::vector<std::vector<int>> cores;  // of the mask `known`
    const cpu_set_t mask = affinity_mask();
    std::lock_guard lock(mutex);
    if (cores.empty() || !CPU_EQUAL(&mask, &known)) cores = cores_of(mask);
    known = mask;
    return cores;
}

int num_usable_cores() { return std::max(1, std::min(static_cast<int>(usable_cores().size()), cgroup_quota())); }

std::int64_t second_level_cache_bytes() {
    static const std::int64_t found = [] {
        long bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
        bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return static_cast<std::int64_t>(bytes > 0 ? bytes : 256 << 10);
    }();
    return found;
}

}  // namespace moesaic
