#include "ops/elementwise.h"

#include <vector>

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(ElementwiseKernels, elementwise_kernels)

void row_op(const RowOpArgs& a) {
    const auto rows = elementwise_kernels().row_op;
    for_rows(a.num_rows, 2 * a.width, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

namespace {

// Of two places in a row, the earlier one unless the value of the later one is larger, or the first NaN.
int64_t better(const float* row, int64_t earlier, int64_t later) {
    if (row[earlier] != row[earlier]) return earlier;
    return row[later] > row[earlier] || row[later] != row[later] ? later : earlier;
}

// One row by the whole team, each thread the part that it computed of it, if a product made it.
int64_t argmax_of_wide(const float* row, int64_t width) {
    ThreadPool& pool = thread_pool();
    const int64_t count = pool.num_threads();
    thread_local std::vector<int64_t> kept;
    std::vector<int64_t>& found = kept;                // the caller's, for all threads
    found.assign(static_cast<std::size_t>(count), 0);  // a call from inside a task has a team of one
    pool.run([&](Team& team) {
        const int64_t t = team.thread(), n = team.num_threads(), begin = width * t / n;
        found[static_cast<std::size_t>(t)] =
            begin + elementwise_kernels().argmax(row + begin, width * (t + 1) / n - begin);
    });
    int64_t best = found[0];
    for (std::size_t t = 1; t < found.size(); ++t) best = better(row, best, found[t]);
    return best;
}

}  // namespace

void argmax(const float* x, int64_t stride, int64_t num_rows, int64_t width, int64_t* indices) {
    ThreadPool& pool = thread_pool();
    if (num_rows < pool.num_threads() && width >= 2 * kFloatsPerChunk) {
        for (int64_t i = 0; i < num_rows; ++i) indices[i] = argmax_of_wide(x + i * stride, width);
        return;
    }
    const auto of_row = elementwise_kernels().argmax;
    for_rows(num_rows, width / 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) indices[i] = of_row(x + i * stride, width);
    });
}

}  // namespace moesaic
