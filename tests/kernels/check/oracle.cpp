#include "oracle.h"

#include <algorithm>
#include <cmath>

#include "kernels/matmul.h"

namespace check {

using moesaic::ActivationKind;

namespace {

double sigmoid(double x) { return 0.5 * (1.0 + std::tanh(0.5 * x)); }

double of_kind(ActivationKind kind, double x) {
    switch (kind) {
        case ActivationKind::kSilu:
            return x * sigmoid(x);
        case ActivationKind::kGelu:
            return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case ActivationKind::kGeluTanh:
            return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        case ActivationKind::kRelu:
            return std::max(x, 0.0);
        default:
            return std::max(x, 0.0) * std::max(x, 0.0);
    }
}

}  // namespace

Seen seen_by(const moesaic::FormatInfo& format, const float* x, std::int64_t count) {
    Seen seen{std::vector<double>(x, x + count), std::vector<double>(static_cast<std::size_t>(count))};
    if (!format.quantized) return seen;
    for (std::int64_t first = 0; first < count; first += 32) {
        float largest = 0.0f;
        for (std::int64_t k = first; k < first + 32; ++k) largest = std::max(largest, std::fabs(x[k]));
        const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
        for (std::int64_t k = first; k < first + 32; ++k) {
            const volatile float product = x[k] * inverse;  // rounded to float before it is rounded to an integer
            seen.values[k] = std::nearbyint(static_cast<double>(product)) * scale;
            seen.steps[k] = scale;
        }
    }
    return seen;
}

double dot(const float* weights, const std::vector<double>& x) {
    double sum = 0.0;
    for (std::size_t k = 0; k < x.size(); ++k) sum += weights[k] * x[k];
    return sum;
}

Products linear_oracle(const moesaic::FormatInfo& format, const float* rows, std::int64_t num_rows, std::int64_t cols,
                       const float* x, std::int64_t x_stride, std::int64_t num_tokens) {
    constexpr double kBf16 = 0x1p-8 + 0x1p-9;  // weights are cut, activations rounded
    const moesaic::MatmulKernels& kernels = moesaic::matmul_table().formats[format.index];
    const bool in_bf16 = format.quantized && moesaic::wants_bf16(kernels, cols, num_tokens);
    Products out;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
        const float* token = x + t * x_stride;
        const std::vector<double> values =
            in_bf16 ? std::vector<double>(token, token + cols) : seen_by(format, token, cols).values;
        for (std::int64_t r = 0; r < num_rows; ++r) {
            double size = 0.0;
            for (std::int64_t k = 0; in_bf16 && k < cols; ++k) size += std::fabs(rows[r * cols + k] * values[k]);
            out.values.push_back(dot(rows + r * cols, values));
            out.allowed.push_back(kBf16 * size);
        }
    }
    return out;
}

double activate(const moesaic::Activation& activation, const double* gate, double up) {
    if (activation.kind != ActivationKind::kSwigluOai) {
        return gate == nullptr ? of_kind(activation.kind, up) : of_kind(activation.kind, *gate) * up;
    }
    const double limit = activation.limit, g = std::min(*gate, limit);
    return g * sigmoid(activation.alpha * g) * (std::clamp(up, -limit, limit) + 1.0);
}

}  // namespace check
