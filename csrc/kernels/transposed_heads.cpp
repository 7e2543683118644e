#include <algorithm>
#include <vector>

#include "kernels/independent_rows.h"
#include "kernels/linear.h"
#include "kernels/matmul.h"
#include "kernels/scratch.h"
#include "thread_pool.h"

namespace moesaic {

namespace {

// The rows of one head for a few tokens, padded with zeros to whole panels.
struct PaddedRows {
    AlignedArray<float> storage;
    const float* rows[kMaxTransposedTokens];

    void fill(const float* x, std::int64_t token_stride, int num_tokens, std::int64_t before, std::int64_t count) {
        const std::int64_t padded = (before + count + 15) / 16 * 16;
        float* data = storage.reserve(static_cast<std::size_t>(padded * num_tokens));
        for (int t = 0; t < num_tokens; ++t, data += padded) {
            std::fill_n(data, before, 0.0f);
            std::copy_n(x + t * token_stride, count, data + before);
            std::fill(data + before + count, data + padded, 0.0f);
            rows[t] = data;
        }
    }
};

constexpr std::int64_t kTokensPerPass = 128;  // whose sums stay in the first-level cache

// Columns [first_col, first_col + num_cols) of a head's rows, transposed into a matrix of F32 of its own, which many
// tokens are then multiplied with.
class TransposedColumns {
  public:
    // The rows begin with a panel and are whole panels.
    void fill(const HeadMatrices& w, std::int64_t head, std::int64_t first_col, int num_cols) {
        const MatmulKernels& kernels = matmul_table().formats[w.format->index];
        const std::int64_t first_row = w.first_row + head * w.row_step, panel_bytes = w.format->panel_bytes(w.cols);
        const std::uint8_t* panel = w.weights + head * w.matrix_bytes + first_row / 16 * panel_bytes;
        num_rows_ = w.num_rows;
        num_cols_ = num_cols;
        float* to = columns_.reserve(static_cast<std::size_t>(num_rows_ * num_cols));
        for (std::int64_t row = 0; row < num_rows_; row += 16, panel += panel_bytes) {
            kernels.transpose(panel, first_col, num_cols, to + 16 * row, 16 * num_rows_);
        }
    }

    // out[t][...] = x[t] times the columns, for tokens of one head.
    void multiply(const float* x, std::int64_t x_stride, std::int64_t num_tokens, float* out, std::int64_t out_stride) {
        const MatmulKernels& kernels = matmul_table().formats[format_info(kF32).index];
        for (std::int64_t first = 0; first < num_tokens; first += kTokensPerPass) {
            const std::int64_t here = std::min(kTokensPerPass, num_tokens - first);
            rows_.resize(static_cast<std::size_t>(here));
            for (std::int64_t t = 0; t < here; ++t) rows_[static_cast<std::size_t>(t)] = x + (first + t) * x_stride;
            float* sums = sums_.reserve(output_size(here));
            for (int col = 0; col < num_cols_; col += kOutputStride) {
                const int width = std::min(kOutputStride, num_cols_ - col);
                const auto* panels = reinterpret_cast<const std::uint8_t*>(columns_.data() + col * num_rows_);
                kernels.matmul(panels, width / 16, num_rows_, rows_.data(), here, sums, panels);
                for (std::int64_t t = 0; t < here; ++t) {
                    std::copy_n(sums + t * kOutputStride, width, out + (first + t) * out_stride + col);
                }
            }
        }
    }

  private:
    static constexpr int kF32 = 0;  // its number
    std::int64_t num_rows_ = 0;
    int num_cols_ = 0;
    AlignedArray<float> columns_, sums_;
    std::vector<const void*> rows_;
};

// Are there enough tokens to transpose the weights for them, and are these whole panels and vectors?
bool goes_transposed(const HeadMatrices& w, std::int64_t num_tokens) {
    const bool whole = w.first_row % 16 == 0 && w.row_step % 16 == 0 && w.num_rows % 16 == 0 && w.cols % 16 == 0;
    return whole && num_tokens > 2 * kMaxTransposedTokens && !independent_rows();
}

void multiply_transposed(const HeadMatrices& w, HeadRows<const float> x, HeadRows<float> y, std::int64_t num_tokens) {
    const std::int64_t col_blocks = (w.cols + kTransposedCols - 1) / kTransposedCols;
    thread_pool().parallel_for(w.num_heads * col_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
        static thread_local TransposedColumns columns;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t head = item / col_blocks, col = item % col_blocks * kTransposedCols;
            columns.fill(w, head, col, static_cast<int>(std::min<std::int64_t>(kTransposedCols, w.cols - col)));
            columns.multiply(x.data + head * x.head_stride, x.token_stride, num_tokens,
                             y.data + head * y.head_stride + col, y.token_stride);
        }
    });
}

}  // namespace

void linear_transposed_heads(const HeadMatrices& w, HeadRows<const float> x, HeadRows<float> y,
                             std::int64_t num_tokens) {
    check_rows(*w.format, w.rows, w.cols, w.first_row, w.num_rows + (w.num_heads - 1) * w.row_step);
    if (goes_transposed(w, num_tokens)) return multiply_transposed(w, x, y, num_tokens);
    const MatmulKernels& kernels = matmul_table().formats[w.format->index];
    const std::int64_t panel_bytes = w.format->panel_bytes(w.cols);
    const std::int64_t col_blocks = (w.cols + kTransposedCols - 1) / kTransposedCols;
    const std::int64_t token_blocks = (num_tokens + kMaxTransposedTokens - 1) / kMaxTransposedTokens;
    thread_pool().parallel_for(w.num_heads * col_blocks * token_blocks, 1, [&](std::int64_t item, std::int64_t) {
        static thread_local PaddedRows padded;
        const std::int64_t token = item % token_blocks * kMaxTransposedTokens;
        const std::int64_t col = item / token_blocks % col_blocks * kTransposedCols;
        const std::int64_t head = item / token_blocks / col_blocks;
        const std::int64_t first_row = w.first_row + head * w.row_step;
        const int here = static_cast<int>(std::min<std::int64_t>(kMaxTransposedTokens, num_tokens - token));
        float* out[kMaxTransposedTokens];
        for (int t = 0; t < here; ++t) out[t] = y.data + (token + t) * y.token_stride + head * y.head_stride + col;
        padded.fill(x.data + token * x.token_stride + head * x.head_stride, x.token_stride, here, first_row % 16,
                    w.num_rows);
        kernels.transposed(w.weights + head * w.matrix_bytes + first_row / 16 * panel_bytes, panel_bytes,
                           (first_row % 16 + w.num_rows + 15) / 16, col,
                           static_cast<int>(std::min<std::int64_t>(kTransposedCols, w.cols - col)), padded.rows, here,
                           out);
    });
}

}  // namespace moesaic
