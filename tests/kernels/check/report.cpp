#include "report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

namespace check {

namespace {

constexpr int kMostPrinted = 20;  // mismatches per subject

}  // namespace

void Report::start(std::string subject) {
    subject_ = std::move(subject);
    comparisons_ = failures_ = 0;
}

void Report::fail(const std::string& what) {
    ++total_failures_;
    if (++failures_ <= kMostPrinted) std::printf("MISMATCH %s %s\n", subject_.c_str(), what.c_str());
    std::fflush(stdout);
}

void Report::expect(bool holds, const std::string& name) {
    ++comparisons_;
    if (!holds) fail(name);
}

void Report::expect_close(const std::vector<float>& actual, const std::vector<double>& expected, double tolerance,
                          const std::string& name, const std::vector<double>& allowed) {
    ++comparisons_;
    if (actual.size() != expected.size()) return fail(text(name, ": ", actual.size(), " values"));
    double largest = 1e-30, worst = 0.0;
    for (double value : expected) largest = std::max(largest, std::fabs(value));
    std::size_t at = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const double most = tolerance * largest + (allowed.empty() ? 0.0 : allowed[i]);
        const double error = std::fabs(actual[i] - expected[i]) / most;
        if (error <= worst) continue;  // not for NaN
        worst = error;
        at = i;
        if (std::isnan(error)) break;
    }
    if (worst <= 1.0) return;
    fail(text(name, ": value ", at, " is ", actual[at], ", expected ", expected[at], " (", worst,
              " x the error allowed; the largest value is ", largest, ")"));
}

void Report::finish() {
    std::printf("%-14s %lld comparisons, %lld mismatches\n", subject_.c_str(), static_cast<long long>(comparisons_),
                static_cast<long long>(failures_));
    std::fflush(stdout);
}

}  // namespace check
