// y = W x for packed matrices, on the thread pool.
#pragma once

#include <cstdint>
#include <span>

#include "formats/registry.h"
#include "kernels/activations.h"

namespace moesaic {

// Rows [first_row, first_row + num_rows) of one matrix, and where their products go.
struct LinearJob {
    const FormatInfo* format;
    std::int64_t rows, cols;      // of the matrix
    const std::uint8_t* weights;  // packed
    std::int64_t first_row, num_rows;
    const float* bias;        // [num_rows] or null
    float* out;               // [num_tokens, num_rows]
    std::int64_t out_stride;  // floats between tokens
    std::int64_t input;       // index into the inputs
};

// num_inputs x num_tokens rows of activations: x[input * input_stride + token * token_stride ...].
struct LinearInputs {
    const float* x;
    std::int64_t token_stride;
    std::int64_t input_stride = 0;
    std::int64_t num_inputs = 1;
};

// Throws std::invalid_argument unless a matrix of rows x cols can have this format and has those rows.
void check_rows(const FormatInfo& format, std::int64_t rows, std::int64_t cols, std::int64_t first, std::int64_t count);

// All jobs in one pass of the pool; their matrices have as many columns as the inputs. Each input is quantised once.
// Throws std::invalid_argument for shapes that do not go together.
void linear(std::span<const LinearJob> jobs, const LinearInputs& inputs, std::int64_t num_tokens);

// Equal pieces of packed weights, one per head: head h has rows [first_row, first_row + num_rows) of the rows x cols
// matrix at weights + h * matrix_bytes, moved down by h * row_step. For the halves of MLA's kv_b projection.
struct HeadMatrices {
    const FormatInfo* format;
    std::int64_t rows, cols;
    const std::uint8_t* weights;
    std::int64_t matrix_bytes, row_step, num_heads;
    std::int64_t first_row, num_rows;
};

// Where head h of token t lies: pointer + t * token_stride + h * head_stride.
template <class Float>
struct HeadRows {
    Float* data;
    std::int64_t token_stride, head_stride;
};

// y[t][h] = W_h x[t][h]: [num_rows] from [cols].
void linear_heads(const HeadMatrices& w, HeadRows<const float> x, HeadRows<float> y, std::int64_t num_tokens);

// y[t][h] = x[t][h] W_h: [cols] from [num_rows], in float32 whatever the format.
void linear_transposed_heads(const HeadMatrices& w, HeadRows<const float> x, HeadRows<float> y,
                             std::int64_t num_tokens);

}  // namespace moesaic
