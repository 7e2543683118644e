// Products with packed weights: every format, awkward shapes, any number of tokens.
#include "kernels/linear.h"

#include <algorithm>

#include "oracle.h"
#include "parts.h"
#include "samples.h"

namespace check {

using moesaic::FormatInfo;
using moesaic::LinearJob;

namespace {

constexpr std::int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 17, 33, 48};

struct Shape {
    std::int64_t rows, cols;
};

// Rows that fill no tile; columns that are odd multiples of the block and end inside a chunk of 256.
std::vector<Shape> shapes(const FormatInfo& format) {
    const std::int64_t block = format.block;
    if (block == 1) return {{1, 1}, {16, 64}, {37, 257}, {53, 31}};
    return {{1, block}, {15, 3 * block}, {32, block}, {53, block >= 256 ? 3 * block : (256 / block + 1) * block}};
}

LinearJob whole(const Matrices& m, const float* bias, std::vector<float>& out) {
    return {m.format, m.rows, m.cols, m.packed.get(), 0, m.rows, bias, out.data(), m.rows, 0};
}

void check_format(Report& report, const FormatInfo& format, const Shape& shape) {
    const Matrices m(format, shape.rows, shape.cols, 1, 3);
    for (std::int64_t num_tokens : kTokens) {
        Random random(static_cast<std::uint64_t>(num_tokens));
        const std::vector<float> x = activations(random, num_tokens, m.cols), bias = normals(random, m.rows);
        Products expected = linear_oracle(format, m.values.data(), m.rows, m.cols, x.data(), m.cols, num_tokens);
        const bool biased = num_tokens % 2 == 1;
        for (std::size_t i = 0; biased && i < expected.values.size(); ++i) expected.values[i] += bias[i % bias.size()];
        std::vector<float> out(expected.values.size());
        const LinearJob job = whole(m, biased ? bias.data() : nullptr, out);
        moesaic::linear({&job, 1}, {x.data(), m.cols}, num_tokens);
        report.expect_close(out, expected.values, kFloat32Sums,
                            text("linear ", format.name, " ", m.rows, " x ", m.cols, ", ", num_tokens, " tokens"),
                            expected.allowed);
    }
}

// Some rows of a matrix, from tokens that lie apart, into memory of which nothing else may change.
void check_rows_and_strides(Report& report, const FormatInfo& format) {
    const std::int64_t cols = std::max<std::int64_t>(format.block, 64), rows = 70, x_stride = cols + 11, stride = 100;
    const Matrices m(format, rows, cols, 1, 4);
    Random random(5);
    const std::vector<float> x = activations(random, 6, x_stride);
    const std::int64_t ranges[][2] = {{0, 70}, {16, 48}, {5, 70}, {33, 34}};
    for (const auto& [first, last] : ranges) {
        std::vector<float> out(6 * stride, 7.0f);
        const LinearJob job{&format,      rows,    cols,           m.packed.get(), first,
                            last - first, nullptr, out.data() + 9, stride,         0};
        moesaic::linear({&job, 1}, {x.data(), x_stride}, 6);
        const std::vector<double> products =
            linear_oracle(format, &m.values[first * cols], last - first, cols, x.data(), x_stride, 6).values;
        std::vector<double> expected(out.size(), 7.0);
        for (std::int64_t t = 0; t < 6; ++t) {
            std::copy_n(&products[t * (last - first)], last - first, &expected[t * stride + 9]);
        }
        report.expect_close(out, expected, kFloat32Sums,
                            text("linear ", format.name, ", rows ", first, " to ", last, " of 70"));
    }
}

// Many columns: a few tokens give the same bits as one by one.
void check_few_tokens(Report& report, const FormatInfo& format) {
    const std::int64_t cols = 2304, rows = 33, num_tokens = 4;
    const Matrices m(format, rows, cols, 1, 7);
    Random random(10);
    const std::vector<float> x = activations(random, num_tokens, cols);
    std::vector<float> together(num_tokens * rows), alone(num_tokens * rows);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        LinearJob job = whole(m, nullptr, alone);
        job.out += t * rows;
        moesaic::linear({&job, 1}, {x.data() + t * cols, cols}, 1);
    }
    for (std::int64_t count = 2; count <= num_tokens; ++count) {
        const LinearJob job = whole(m, nullptr, together);
        moesaic::linear({&job, 1}, {x.data(), cols}, count);
        report.expect(std::equal(together.begin(), together.begin() + count * rows, alone.begin()),
                      text("linear ", format.name, ", ", count, " tokens one by one"));
    }
}

// Matrices of all formats in one call give the same bits as one by one.
void check_many_jobs(Report& report) {
    const std::int64_t cols = 512, num_tokens = 5;
    std::vector<Matrices> matrices;
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        const FormatInfo& format = moesaic::format_at(i);
        if (fits(format, cols)) matrices.emplace_back(format, 9 + 13 * (i % 5), cols, 1, i);
    }
    Random random(6);
    const std::vector<float> x = activations(random, num_tokens, cols);
    std::vector<std::vector<float>> together, alone;
    for (const Matrices& m : matrices) together.emplace_back(num_tokens * m.rows);
    alone = together;
    std::vector<LinearJob> jobs;
    for (std::size_t i = 0; i < matrices.size(); ++i) jobs.push_back(whole(matrices[i], nullptr, together[i]));
    moesaic::linear(jobs, {x.data(), cols}, num_tokens);
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        const LinearJob job = whole(matrices[i], nullptr, alone[i]);
        moesaic::linear({&job, 1}, {x.data(), cols}, num_tokens);
        report.expect(together[i] == alone[i], text("linear of many matrices, ", matrices[i].format->name));
    }
}

// Pieces of a stack of matrices, one per head.
struct HeadCase {
    static constexpr std::int64_t kHeads = 3, kFirst = 3, kRows = 14;
    Matrices m;
    moesaic::HeadMatrices w;

    explicit HeadCase(const FormatInfo& format)
        : m(format, 20, format.block == 1 ? 257 : (256 / format.block + 1) * format.block, kHeads, 8),
          w{&format, m.rows, m.cols, m.packed.get(), m.matrix_bytes, 0, kHeads, kFirst, kRows} {}
    const float* row(std::int64_t head, std::int64_t r) const {
        return &m.values[((head * m.rows) + kFirst + r) * m.cols];
    }
};

void check_head_products(Report& report, const HeadCase& c, std::int64_t num_tokens) {
    constexpr std::int64_t kHeads = HeadCase::kHeads, kRows = HeadCase::kRows;
    Random random(9);
    const std::int64_t cols = c.m.cols;
    const std::vector<float> x = activations(random, num_tokens, kHeads * cols);
    std::vector<float> out(num_tokens * kHeads * kRows);
    std::vector<double> expected;
    for (std::int64_t i = 0; i < num_tokens * kHeads; ++i) {
        const auto part = linear_oracle(*c.m.format, c.row(i % kHeads, 0), kRows, cols, &x[i * cols], cols, 1).values;
        expected.insert(expected.end(), part.begin(), part.end());
    }
    moesaic::linear_heads(c.w, {x.data(), kHeads * cols, cols}, {out.data(), kHeads * kRows, kRows}, num_tokens);
    report.expect_close(out, expected, kFloat32Sums,
                        text("linear_heads ", c.m.format->name, ", ", num_tokens, " tokens"));
}

void check_transposed(Report& report, const HeadCase& c, std::int64_t num_tokens) {
    constexpr std::int64_t kHeads = HeadCase::kHeads, kRows = HeadCase::kRows;
    Random random(10);
    const std::int64_t cols = c.m.cols;
    const std::vector<float> x = normals(random, num_tokens * kHeads * kRows);
    std::vector<float> out(num_tokens * kHeads * cols);
    std::vector<double> expected(out.size());
    for (std::int64_t i = 0; i < num_tokens * kHeads; ++i) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            const float* row = c.row(i % kHeads, r);
            for (std::int64_t k = 0; k < cols; ++k) {
                expected[i * cols + k] += static_cast<double>(x[i * kRows + r]) * row[k];
            }
        }
    }
    moesaic::linear_transposed_heads(c.w, {x.data(), kHeads * kRows, kRows}, {out.data(), kHeads * cols, cols},
                                     num_tokens);
    report.expect_close(out, expected, kFloat32Sums,
                        text("linear_transposed_heads ", c.m.format->name, ", ", num_tokens, " tokens"));
}

}  // namespace

void check_linear(Report& report) {
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        const FormatInfo& format = moesaic::format_at(i);
        for (const Shape& shape : shapes(format)) check_format(report, format, shape);
        check_rows_and_strides(report, format);
        if (format.quantized) check_few_tokens(report, format);
    }
    check_many_jobs(report);
}

void check_heads(Report& report) {
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        const HeadCase c(moesaic::format_at(i));
        for (std::int64_t num_tokens : {1, 6}) {
            check_head_products(report, c, num_tokens);
            check_transposed(report, c, num_tokens);
        }
    }
}

}  // namespace check
