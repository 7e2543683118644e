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

using Clock = std::chrono::steady_clock;

constexpr int kMinRepetitions = 3;
constexpr double kWindow = 0.05;              // seconds that all threads read, whatever each of them gets done
constexpr int64_t kFloatsPerStep = 128;       // what one round of the summing kernel reads
constexpr int64_t kFloatsPerLook = 1 << 16;   // 256 KiB between two looks at the clock
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

// Every thread reads its own memory, in turn, until the window is over. That all of them read the same amount would
// make the slowest thread the measure, while threads that work on one thing help each other.
Rates read_bandwidth(int64_t num_bytes, double seconds) {
    const int64_t per_thread = num_bytes / static_cast<int64_t>(sizeof(float)) / num_threads();
    const int64_t num_floats = std::max(kFloatsPerStep, per_thread / kFloatsPerStep * kFloatsPerStep);
    const auto sum = probe_kernels().sum;
    const double window = std::min(kWindow, seconds / kMinRepetitions);
    struct Reader {
        std::unique_ptr<float, Free> memory;
        int64_t next = 0;
    };
    return measure(
        seconds, [&] { return Reader{touched_memory(num_floats)}; },
        [&](Reader& reader) {
            const auto begin = Clock::now();
            int64_t done = 0;
            do {
                const int64_t count = std::min(kFloatsPerLook, num_floats - reader.next);
                volatile float sink = sum(reader.memory.get() + reader.next, count);  // used, so it cannot be left out
                (void)sink;
                done += count;
                reader.next = reader.next + count == num_floats ? 0 : reader.next + count;
            } while (std::chrono::duration<double>(Clock::now() - begin).count() < window);
            return done * static_cast<int64_t>(sizeof(float));
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
