#include "kernels/linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/matmul.h"
#include "kernels/prepared_tokens.h"
#include "kernels/scratch.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace moesaic {

void check_rows(const FormatInfo& format, std::int64_t rows, std::int64_t cols, std::int64_t first,
                std::int64_t count) {
    check_matrix(format, rows, cols);
    if (first < 0 || count < 1 || first > rows - count) {
        throw std::invalid_argument("rows " + std::to_string(first) + " to " + std::to_string(first + count) +
                                    " of a matrix with " + std::to_string(rows) + " rows");
    }
}

namespace {

// Tokens of one pass over a pair of panels: their sums stay in the cache.
constexpr std::int64_t kTokensPerPass = 256;

// Pairs of panels that hold a job's rows, counted from the panel of its first row.
std::int64_t num_pairs(const LinearJob& job) {
    return (job.first_row % 16 + job.num_rows + kOutputStride - 1) / kOutputStride;
}

// Where a pair of panels of a job begins.
const std::uint8_t* pair_address(const LinearJob& job, std::int64_t pair) {
    return job.weights + (job.first_row / 16 + pair * kMaxPanels) * job.format->panel_bytes(job.cols);
}

// Some of the tokens of a call.
struct TokenRange {
    std::int64_t begin, end;
};

// How the tokens of a call are divided where its pairs of panels alone are too few for the threads, as those of a
// router are: into parts of `size`, whole tiles of rows.
struct TokenParts {
    std::int64_t size, count;

    TokenParts(std::int64_t num_tokens, std::int64_t num_pairs, std::int64_t num_threads) {
        const std::int64_t wanted = num_threads > 1 ? (2 * num_threads + num_pairs - 1) / num_pairs : 1;
        size = padded_tokens((num_tokens + wanted - 1) / wanted);
        count = (num_tokens + size - 1) / size;
    }
};

// Pairs of panels of a job, as many as a call of its kernel takes.
struct Pairs {
    std::int64_t first, count;
};

// How many pairs a thread takes at most: by tiles, activations of many tokens come from the second-level cache for all
// but the first.
int most_pairs(const TokenForms& forms, std::int64_t num_tokens) {
    return forms.bf16 && num_tokens > 2 * kTokenPadding ? kMaxTilePairs : 1;
}

// Sums of some tokens and rows [top, end) of the matrix, in pairs of panels, into the job's output.
void store_sums(const LinearJob& job, std::int64_t top, std::int64_t end, const float* sums, std::int64_t first_token,
                std::int64_t num_tokens) {
    const std::int64_t pair_size = static_cast<std::int64_t>(output_size(num_tokens));
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        float* out = job.out + (first_token + t) * job.out_stride - job.first_row;
        const float* sum = sums + t * kOutputStride;
        for (std::int64_t first = top; first < end; first += kOutputStride, sum += pair_size) {
            const std::int64_t from = std::max(first, job.first_row), to = std::min(first + kOutputStride, end);
            if (job.bias == nullptr) {
                std::copy(sum + (from - first), sum + (to - first), out + from);
            } else {
                for (std::int64_t r = from; r < to; ++r) out[r] = sum[r - first] + job.bias[r - job.first_row];
            }
        }
    }
}

// Pairs of panels of a job for some of its num_tokens tokens; several only by tiles. `next`: what this thread will
// probably read afterwards.
void multiply_pairs(const LinearJob& job, const MatmulKernels& kernels, Pairs pairs, const PreparedTokens& prepared,
                    std::int64_t num_tokens, TokenRange range, AlignedArray<float>& sums, const std::uint8_t* next) {
    const bool bf16 = wants_bf16(kernels, job.cols, num_tokens);
    const std::int64_t top = job.first_row / 16 * 16 + pairs.first * kOutputStride;  // row of the matrix
    const std::int64_t end = std::min(top + pairs.count * kOutputStride, job.first_row + job.num_rows);
    const std::uint8_t* panels = pair_address(job, pairs.first);
    const int num_panels = static_cast<int>((end - top + 15) / 16);
    for (std::int64_t first = range.begin; first < range.end; first += kTokensPerPass) {
        const std::int64_t here = std::min(kTokensPerPass, range.end - first);
        float* y = sums.reserve(output_size(here) * static_cast<std::size_t>(pairs.count));
        const bool last = first + here == range.end;
        if (bf16) {
            kernels.matmul_bf16(panels, num_panels, job.cols,
                                prepared.bf16(job.input * padded_tokens(num_tokens) + first), here, y,
                                last ? next : panels);
        } else {
            kernels.matmul(panels, num_panels, job.cols,
                           prepared.tokens(job.format->quantized) + job.input * num_tokens + first, here, y,
                           last ? next : panels);
        }
        store_sums(job, top, end, y, first, here);
    }
}

void check_jobs(std::span<const LinearJob> jobs, std::int64_t num_inputs) {
    for (const LinearJob& job : jobs) {
        check_rows(*job.format, job.rows, job.cols, job.first_row, job.num_rows);
        if (job.input < 0 || job.input >= num_inputs || job.cols != jobs[0].cols) {
            throw std::invalid_argument("the matrices of one linear call must fit its inputs");
        }
    }
}

}  // namespace

void linear(std::span<const LinearJob> jobs, const LinearInputs& inputs, std::int64_t num_tokens) {
    check_jobs(jobs, inputs.num_inputs);
    if (jobs.empty() || num_tokens < 1) return;
    std::vector<std::int64_t> first_item(1, 0);  // of each job
    const MatmulKernels* kernels = matmul_table().formats;
    TokenForms forms;
    for (const LinearJob& job : jobs) {
        first_item.push_back(first_item.back() + num_pairs(job));
        forms.add(kernels[job.format->index], job.format->quantized, job.cols, num_tokens);
    }
    const PreparedTokens prepared(
        inputs.num_inputs * num_tokens, jobs[0].cols, forms,
        [&](std::int64_t i) {
            return inputs.x + i / num_tokens * inputs.input_stride + i % num_tokens * inputs.token_stride;
        },
        inputs.num_inputs * padded_tokens(num_tokens),
        [&](std::int64_t i) { return i / num_tokens * padded_tokens(num_tokens) + i % num_tokens; });
    ThreadPool& pool = thread_pool();
    const TokenParts parts(num_tokens, first_item.back(), pool.num_threads());
    WorkQueue items(first_item.back() * parts.count, pool.num_threads());
    // Parts of tokens follow each other: where there are several, the pairs of two items are the same ones.
    const int most = parts.count == 1 ? most_pairs(forms, num_tokens) : 1;
    pool.run([&](Team& team) {
        static thread_local AlignedArray<float> sums;
        for (WorkQueue::Range taken; items.next_part(team.thread(), 4, 1, most, taken);) {
            const std::int64_t part = taken.begin % parts.count;
            const TokenRange range{part * parts.size, std::min(num_tokens, (part + 1) * parts.size)};
            const std::int64_t end = taken.begin / parts.count + (taken.end - taken.begin);
            for (std::int64_t item = taken.begin / parts.count, count; item < end; item += count) {
                const auto after = std::upper_bound(first_item.begin(), first_item.end(), item);
                const LinearJob& job = jobs[static_cast<std::size_t>(after - first_item.begin() - 1)];
                const MatmulKernels& its = kernels[job.format->index];
                count = wants_bf16(its, job.cols, num_tokens) ? std::min(end, *after) - item : 1;
                const std::int64_t pair = item - *(after - 1);
                // The item after these: usually the next pair, else the first of the next job.
                const bool last = item + count == *after;
                const std::uint8_t* next = last && after + 1 != first_item.end() ? pair_address((&job)[1], 0)
                                                                                 : pair_address(job, pair + count);
                multiply_pairs(job, its, {pair, count}, prepared, num_tokens, range, sums, next);
            }
        }
    });
}

void linear_heads(const HeadMatrices& w, HeadRows<const float> x, HeadRows<float> y, std::int64_t num_tokens) {
    std::vector<LinearJob> jobs;
    for (std::int64_t h = 0; h < w.num_heads; ++h) {
        jobs.push_back({w.format, w.rows, w.cols, w.weights + h * w.matrix_bytes, w.first_row + h * w.row_step,
                        w.num_rows, nullptr, y.data + h * y.head_stride, y.token_stride, h});
    }
    linear(jobs, {x.data, x.token_stride, x.head_stride, w.num_heads}, num_tokens);
}

}  // namespace moesaic
