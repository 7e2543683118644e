// What only shows with several threads: callers at the same time, errors in the middle, a changing number of threads.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "kernels/linear.h"
#include "oracle.h"
#include "parts.h"
#include "samples.h"
#include "thread_pool.h"

namespace check {

namespace {

constexpr std::int64_t kTokens = 3;

std::vector<float> multiply(const Matrices& m, const std::vector<float>& x) {
    std::vector<float> out(static_cast<std::size_t>(kTokens * m.rows));
    const moesaic::LinearJob job{m.format, m.rows, m.cols, m.packed.get(), 0, m.rows, nullptr, out.data(), m.rows, 0};
    moesaic::linear({&job, 1}, {x.data(), m.cols}, kTokens);
    return out;
}

// Tasks that fail before, between and after other calls leave the pool usable.
void check_errors(Report& report, const Matrices& m, const std::vector<float>& x, const std::vector<float>& expected) {
    for (int thrower = 0; thrower < moesaic::num_threads(); ++thrower) {
        bool caught = false;
        try {
            moesaic::thread_pool().run([&](moesaic::Team& team) {
                if (team.thread() == thrower) throw std::runtime_error("as planned");
                team.barrier();
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        report.expect(caught, text("the error of thread ", thrower, " reaches the caller"));
        report.expect(multiply(m, x) == expected, text("linear after an error of thread ", thrower));
    }
}

}  // namespace

void check_threads(Report& report) {
    const int before = moesaic::num_threads();
    const Matrices m(moesaic::format_info(8), 200, 64, 1, 61);  // Q8_0
    Random random(62);
    const std::vector<float> x = activations(random, kTokens, m.cols), expected = multiply(m, x);
    check_errors(report, m, x, expected);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([&] {
            for (int i = 0; i < 20; ++i) wrong += multiply(m, x) != expected;
        });
    }
    for (int count : {1, 2, 5}) {
        moesaic::set_num_threads(count);
        wrong += multiply(m, x) != expected;
    }
    for (std::thread& caller : callers) caller.join();
    moesaic::set_num_threads(before);
    report.expect(wrong == 0, text(wrong.load(), " calls beside others gave another result"));
}

}  // namespace check
