// Norms, rotations and the small steps between matrix products, row by row in double precision.
#include <algorithm>
#include <cmath>

#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "oracle.h"
#include "parts.h"
#include "samples.h"

namespace check {

using moesaic::HeadNorm;
using moesaic::RopeLayout;
using moesaic::RowOp;

namespace {

constexpr std::int64_t kRows = 5;
constexpr float kEps = 1e-5f;
constexpr std::int64_t kWidths[] = {1, 15, 16, 100, 257};

double rms(const double* x, std::int64_t n) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return std::sqrt(sum / static_cast<double>(n) + kEps);
}

void check_rms_norm(Report& report, std::int64_t width) {
    Random random(31);
    const std::vector<float> x = normals(random, kRows * width), weight = normals(random, width);
    std::vector<float> residual = normals(random, kRows * width), out(x.size());
    std::vector<double> sum(residual.begin(), residual.end()), expected(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) sum[i] += 0.5 * x[i];
    for (std::size_t i = 0; i < x.size(); ++i) {
        expected[i] = sum[i] / rms(&sum[i / width * width], width) * (weight[i % width] + 1.0);
    }
    moesaic::rms_norm({x.data(), width, residual.data(), width, 0.5f, weight.data(), nullptr, 1.0f, kEps, out.data(),
                       width, kRows, width});
    report.expect_close(out, expected, kFloat32Sums, text("rms_norm, width ", width));
    report.expect_close(residual, sum, kFloat32Sums, text("residual of rms_norm, width ", width));
}

void check_layer_norm(Report& report, std::int64_t width) {
    Random random(32);
    const std::vector<float> x = normals(random, kRows * width), weight = normals(random, width);
    const std::vector<float> bias = normals(random, width);
    std::vector<float> out(x.size());
    std::vector<double> expected;
    for (std::int64_t r = 0; r < kRows; ++r) {
        std::vector<double> row(&x[r * width], &x[r * width] + width);
        double mean = 0.0;
        for (double value : row) mean += value / static_cast<double>(width);
        for (double& value : row) value -= mean;
        const double size = rms(row.data(), width);
        for (std::int64_t i = 0; i < width; ++i) expected.push_back(row[i] / size * weight[i] + bias[i]);
    }
    moesaic::layer_norm(
        {x.data(), width, nullptr, 0, 0.0f, weight.data(), bias.data(), 0.0f, kEps, out.data(), width, kRows, width});
    report.expect_close(out, expected, kFloat32Sums, text("layer_norm, width ", width));
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double row_op_oracle(RowOp op, double x, double y, double scale, double gate) {
    using moesaic::ActivationKind;
    switch (op) {
        case RowOp::kSiluMul:
            return activate({ActivationKind::kSilu, 0, 0}, &x, y);
        case RowOp::kGeluMul:
            return activate({ActivationKind::kGelu, 0, 0}, &x, y);
        case RowOp::kGeluTanhMul:
            return activate({ActivationKind::kGeluTanh, 0, 0}, &x, y);
        case RowOp::kSigmoidMul:
            return sigmoid(x) * y;
        case RowOp::kAddScaled:
            return x + scale * y;
        case RowOp::kAddGated:
            return x + sigmoid(gate) * y;
    }
    return NAN;
}

void check_row_ops(Report& report, std::int64_t width) {
    Random random(33);
    const std::vector<float> x = normals(random, kRows * width, 3.0), y = normals(random, kRows * width);
    const std::vector<float> gate = normals(random, kRows);
    std::vector<float> out(x.size());
    std::vector<double> expected(x.size());
    for (int kind = 0; kind <= static_cast<int>(RowOp::kAddGated); ++kind) {
        const auto op = static_cast<RowOp>(kind);
        for (std::size_t i = 0; i < x.size(); ++i) expected[i] = row_op_oracle(op, x[i], y[i], 0.3f, gate[i / width]);
        moesaic::row_op({op, x.data(), width, y.data(), width, out.data(), width, gate.data(), 0.3f, kRows, width});
        report.expect_close(out, expected, kFloat32Sums, text("row_op ", kind, ", width ", width));
    }
    std::vector<std::int64_t> largest(kRows);
    moesaic::argmax(x.data(), width, kRows, width, largest.data());
    for (std::int64_t r = 0; r < kRows; ++r) {
        const float* row = &x[r * width];
        report.expect(largest[r] == std::max_element(row, row + width) - row, text("argmax, width ", width));
    }
}

// One head after another: norm, rotation, norm.
struct RotaryCase {
    static constexpr std::int64_t kTokens = 3, kHeads = 2;
    RopeLayout layout;
    HeadNorm norm;
    std::int64_t head_dim, pairs;

    void rotate(const float* cos, const float* sin, double* x) const {
        const std::vector<double> before(x, x + 2 * pairs);
        for (std::int64_t i = 0; i < pairs; ++i) {
            const bool half_in = layout == RopeLayout::kHalf, half_out = layout != RopeLayout::kInterleaved;
            const double a = before[half_in ? i : 2 * i], b = before[half_in ? i + pairs : 2 * i + 1];
            x[half_out ? i : 2 * i] = a * cos[i] - b * sin[i];
            x[half_out ? i + pairs : 2 * i + 1] = b * cos[i] + a * sin[i];
        }
    }

    // The heads of a token, head_dim apart.
    void apply(const std::vector<float>& weight, const float* cos, const float* sin, double* x) const {
        auto scale = [&](double* values, std::int64_t n) {
            const double size = rms(values, n);
            for (std::int64_t i = 0; i < n; ++i) values[i] *= weight[i] / size;
        };
        if (norm == HeadNorm::kAllHeads) scale(x, kHeads * head_dim);
        for (std::int64_t h = 0; h < kHeads; ++h, x += head_dim) {
            if (norm == HeadNorm::kPerHead) scale(x, head_dim);
            rotate(cos, sin, x);
            if (norm == HeadNorm::kPerHeadAfterRope) scale(x, head_dim);
        }
    }
};

void check_rotary(Report& report, const RotaryCase& c) {
    constexpr std::int64_t kTokens = RotaryCase::kTokens, kHeads = RotaryCase::kHeads;
    Random random(34);
    const std::int64_t token_size = kHeads * c.head_dim;
    std::vector<float> x = normals(random, kTokens * token_size), cos, sin;
    const std::vector<float> weight = normals(random, token_size);
    for (std::int64_t i = 0; i < kTokens * c.pairs; ++i) {
        cos.push_back(static_cast<float>(std::cos(0.1 * static_cast<double>(i))));
        sin.push_back(static_cast<float>(std::sin(0.1 * static_cast<double>(i))));
    }
    std::vector<double> expected(x.begin(), x.end());
    for (std::int64_t t = 0; t < kTokens; ++t) {
        c.apply(weight, &cos[t * c.pairs], &sin[t * c.pairs], &expected[t * token_size]);
    }
    moesaic::RotaryArgs a{};
    a.q = {x.data(), {kTokens * token_size, c.head_dim, token_size}, kHeads, c.head_dim, weight.data()};
    a.batch = 1, a.num_tokens = kTokens;
    a.cos = cos.data(), a.sin = sin.data();
    a.angle_token_stride = c.pairs, a.angle_stride = 1;
    a.num_pairs = c.pairs, a.layout = c.layout, a.norm = c.norm, a.eps = kEps;
    moesaic::norm_and_rotate(a);
    report.expect_close(x, expected, kFloat32Sums,
                        text("norm_and_rotate, layout ", static_cast<int>(c.layout), ", norm ",
                             static_cast<int>(c.norm), ", head ", c.head_dim, ", pairs ", c.pairs));
}

}  // namespace

void check_rows(Report& report) {
    for (std::int64_t width : kWidths) {
        check_rms_norm(report, width);
        check_layer_norm(report, width);
        check_row_ops(report, width);
    }
    for (auto layout : {RopeLayout::kHalf, RopeLayout::kInterleaved, RopeLayout::kInterleavedToHalf}) {
        for (auto norm : {HeadNorm::kNone, HeadNorm::kPerHead, HeadNorm::kPerHeadAfterRope, HeadNorm::kAllHeads}) {
            check_rotary(report, {layout, norm, 80, 40});
            check_rotary(report, {layout, norm, 50, 11});
        }
    }
}

}  // namespace check
