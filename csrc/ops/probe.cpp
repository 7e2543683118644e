#include "ops/probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "thread_pool.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(ProbeKernels, probe_kernels)

namespace {

constexpr int kMinRepetitions = 3;
constexpr int64_t kFloatsPerStep = 128;       // what one round of the summing kernel reads
constexpr std::size_t kHugePage = 2u << 20u;  // so that the page table is not what is measured
constexpr int64_t kPeakRounds = 1 << 20;

struct Free {
    void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> touched_memory(int64_t num_floats) {
    const std::size_t bytes =
        (static_cast<std::size_t>(num_floats) * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
    std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kHugePage, bytes)));
    if (!memory) throw std::bad_alloc();
    madvise(memory.get(), bytes, MADV_HUGEPAGE);  // a wish: without it the figure is only a little lower
    std::fill_n(memory.get(), num_floats, 1.0f);
    return memory;
}

// Runs `work` on every thread of the team, again and again, and collects amount(work) / time.
// prepare() makes what a thread works on; work(item) returns the amount it did.
template <class Prepare, class Work>
Rates measure(double seconds, Prepare&& prepare, Work&& work) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> rates;
    std::atomic<int64_t> amount{0};
    bool again = true;
    auto task = [&](Team& team) {
        auto item = prepare();
        team.barrier();
        const auto start = Clock::now();
        while (again) {
            team.barrier();
            const auto begin = Clock::now();
            amount.fetch_add(work(item), std::memory_order_relaxed);
            team.barrier();
            if (team.thread() == 0) {
                const auto end = Clock::now();
                const double elapsed = std::chrono::duration<double>(end - begin).count();
                rates.push_back(static_cast<double>(amount.exchange(0)) / elapsed * 1e-9);
                again = rates.size() < kMinRepetitions || std::chrono::duration<double>(end - start).count() < seconds;
            }
            team.barrier();
        }
    };
    thread_pool().run(task);
    std::sort(rates.begin(), rates.end());
    return {rates.back(), rates[rates.size() / 2]};
}

}  // namespace

Rates read_bandwidth(int64_t num_bytes, double seconds) {
    const int64_t per_thread = num_bytes / static_cast<int64_t>(sizeof(float)) / num_threads();
    const int64_t num_floats = std::max(kFloatsPerStep, per_thread / kFloatsPerStep * kFloatsPerStep);
    const auto sum = probe_kernels().sum;
    return measure(
        seconds, [&] { return touched_memory(num_floats); },
        [&](const auto& memory) {
            volatile float sink = sum(memory.get(), num_floats);  // a result that is used cannot be left out
            (void)sink;
            return num_floats * static_cast<int64_t>(sizeof(float));
        });
}

Rates peak_ops(PeakKind kind, double seconds) {
    const ProbeKernels& kernels = probe_kernels();
    auto work = kernels.multiply_add_f32;
    if (kind == PeakKind::kDotI8) work = kernels.dot_i8;
    if (kind == PeakKind::kTileBf16) work = kernels.tile_bf16;
    if (work == nullptr) throw std::invalid_argument(std::string(active_isa()) + " has no tiles of bfloat16");
    return measure(
        seconds, [] { return std::vector<float>{0.5f, 1.0f, 0.0f}; },
        [&](std::vector<float>& values) { return work(kPeakRounds, values.data()); });
}

}  // namespace moesaic
