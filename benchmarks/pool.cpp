// What the thread pool costs when there is nothing to do; built and run by pool.py. Prints one line of JSON per number
// of threads given.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kBatch = 200;  // repetitions timed together: a clock may take a microsecond itself

double microseconds(Clock::duration d) { return std::chrono::duration<double, std::micro>(d).count(); }

struct Figures {
    double median, p99;
};

Figures figures_of(std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    return {values[values.size() / 2], values[values.size() * 99 / 100]};
}

// Of batch(), which repeats something kBatch times, per repetition, over so many seconds.
template <class Batch>
Figures measure(double seconds, Batch&& batch) {
    std::vector<double> values;
    batch();
    for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end;) {
        const auto start = Clock::now();
        batch();
        values.push_back(microseconds(Clock::now() - start) / kBatch);
    }
    return figures_of(values);
}

void report(int num_threads, double seconds) {
    moesaic::ThreadPool pool(num_threads);
    const Figures run = measure(seconds, [&] {
        for (int i = 0; i < kBatch; ++i) pool.run([](moesaic::Team&) {});
    });
    const Figures barrier = measure(seconds, [&] {
        pool.run([](moesaic::Team& team) {
            for (int i = 0; i < kBatch; ++i) team.barrier();
        });
    });
    std::vector<double> first;
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the pool parks
        const auto start = Clock::now();
        pool.run([](moesaic::Team&) {});
        first.push_back(microseconds(Clock::now() - start));
    }
    const Figures parked = figures_of(first);
    std::printf(
        "{\"threads\": %d, \"run_us\": %.3f, \"run_p99_us\": %.3f, \"barrier_us\": %.3f, \"barrier_p99_us\": %.3f, "
        "\"parked_run_us\": %.1f}\n",
        num_threads, run.median, run.p99, barrier.median, barrier.p99, parked.median);
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 1.0;
    for (int i = 2; i < argc; ++i) report(std::atoi(argv[i]), seconds);
    return 0;
}
