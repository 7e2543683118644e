#include "ops/elementwise.h"

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(ElementwiseKernels, elementwise_kernels)

void row_op(const RowOpArgs& a) {
    const auto rows = elementwise_kernels().row_op;
    for_rows(a.num_rows, 2 * a.width, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

void argmax(const float* x, int64_t stride, int64_t num_rows, int64_t width, int64_t* indices) {
    const auto of_row = elementwise_kernels().argmax;
    for_rows(num_rows, width / 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) indices[i] = of_row(x + i * stride, width);
    });
}

}  // namespace moesaic
