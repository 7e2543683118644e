// What the kernels must compute, in double precision on the floats that a format's own dequantize() reads.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/registry.h"
#include "kernels/activations.h"

namespace check {

// Errors of float32 sums, in units of the largest result.
constexpr double kFloat32Sums = 1e-5;

// Activations as a kernel multiplies them, and the step to the next value that they could have (0 for float formats).
struct Seen {
    std::vector<double> values, steps;
};

// Quantised formats: rounded to int8 in groups of 32, by the same float32 operations as the kernels.
Seen seen_by(const moesaic::FormatInfo& format, const float* x, std::int64_t count);

// The dot product of a row of weights with an input.
double dot(const float* weights, const std::vector<double>& x);

// Products, and how far off they may be beyond kFloat32Sums.
struct Products {
    std::vector<double> values, allowed;
};

// [num_tokens, num_rows] products of rows with tokens that lie x_stride apart. Where the active instruction set rounds
// quantised weights of many tokens to bfloat16, that is allowed.
Products linear_oracle(const moesaic::FormatInfo& format, const float* rows, std::int64_t num_rows, std::int64_t cols,
                       const float* x, std::int64_t x_stride, std::int64_t num_tokens);

// What experts do between up and down; `gate` null: there is none.
double activate(const moesaic::Activation& activation, const double* gate, double up);

}  // namespace check
