#include "moe_rows.h"

#include <algorithm>

namespace moesaic {

void multiply_rows(const ExpertMatrices& m, const MatmulKernels& kernels, const Rows& rows, std::int64_t expert,
                   const ExpertTokens& tokens, float* out, const std::uint8_t* next) {
    const std::int64_t panel_bytes = m.format->panel_bytes(rows.cols), num_panels = rows.num_panels();
    const std::uint8_t* panels = m.weights + expert * m.matrix_bytes + rows.first / kPanel * panel_bytes;
    if (wants_bf16(kernels, rows.cols, tokens.count)) {
        kernels.matmul_bf16(panels, static_cast<int>(num_panels), rows.cols, tokens.bf16, tokens.count, out, next);
    } else {
        for (std::int64_t p = 0; p < num_panels; p += kMaxPanels) {
            const std::int64_t here = std::min<std::int64_t>(kMaxPanels, num_panels - p);
            kernels.matmul(panels + p * panel_bytes, static_cast<int>(here), rows.cols, tokens.rows, tokens.count,
                           out + p / kMaxPanels * pair_size(tokens.count),
                           p + here < num_panels ? panels + (p + here) * panel_bytes : next);
        }
    }
    for (std::int64_t pair = 0; pair < rows.num_pairs(); ++pair, out += pair_size(tokens.count)) {
        const std::int64_t left = rows.count - pair * kPair, here = std::min(kPair, left);
        const std::int64_t computed = std::min(kPair, (left + kPanel - 1) / kPanel * kPanel);
        for (std::int64_t t = 0; t < tokens.count; ++t) {
            float* y = out + t * kOutputStride;
            std::fill(y + computed, y + kOutputStride, 0.0f);
            if (m.bias == nullptr) continue;
            const float* bias = m.bias + expert * m.bias_stride + rows.first + pair * kPair;
            for (std::int64_t r = 0; r < here; ++r) y[r] += bias[r];
        }
    }
}

}  // namespace moesaic
