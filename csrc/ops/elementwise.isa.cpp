#include "ops/elementwise.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

struct SiluMul {
    static vf apply(vf x, vf y, vf) { return mul(silu(x), y); }
};
struct GeluMul {
    static vf apply(vf x, vf y, vf) { return mul(gelu_erf(x), y); }
};
struct GeluTanhMul {
    static vf apply(vf x, vf y, vf) { return mul(gelu_tanh(x), y); }
};
struct SigmoidMul {
    static vf apply(vf x, vf y, vf) { return mul(sigmoid(x), y); }
};
struct AddScaled {
    static vf apply(vf x, vf y, vf factor) { return fma(factor, y, x); }
};

template <class Op>
void apply_row(const float* x, const float* y, vf factor, float* out, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(out + i, Op::apply(load(x + i), load(y + i), factor));
    if (i == width) return;
    const int n = static_cast<int>(width - i);
    store_n(out + i, Op::apply(load_n(x + i, n), load_n(y + i, n), factor), n);
}

void row_op(const RowOpArgs& a, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float* x = a.x + row * a.x_stride;
        const float* y = a.y + row * a.y_stride;
        float* out = a.out + row * a.out_stride;
        const vf none = set1(0.0f);
        switch (a.op) {
            case RowOp::kSiluMul:
                apply_row<SiluMul>(x, y, none, out, a.width);
                break;
            case RowOp::kGeluMul:
                apply_row<GeluMul>(x, y, none, out, a.width);
                break;
            case RowOp::kGeluTanhMul:
                apply_row<GeluTanhMul>(x, y, none, out, a.width);
                break;
            case RowOp::kSigmoidMul:
                apply_row<SigmoidMul>(x, y, none, out, a.width);
                break;
            case RowOp::kAddScaled:
                apply_row<AddScaled>(x, y, set1(a.scale), out, a.width);
                break;
            case RowOp::kAddGated:
                apply_row<AddScaled>(x, y, sigmoid(set1(a.gate[row])), out, a.width);
                break;
        }
    }
}

int64_t argmax(const float* x, int64_t n) {
    constexpr int64_t kBlock = 1024;
    int64_t best = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = begin + kBlock < n ? begin + kBlock : n;
        vf largest = set1(x[best]);
        bool has_nan = false;
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) largest = max(largest, load(x + i));
        float top = reduce_max(largest);
        for (; i < end; ++i) top = x[i] > top ? x[i] : top;
        for (int64_t j = begin; j < end; ++j) has_nan |= x[j] != x[j];
        if (has_nan) {
            while (x[begin] == x[begin]) ++begin;
            return begin;
        }
        if (top == x[best]) continue;
        best = begin;
        while (x[best] != top) ++best;
    }
    return best;
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
    static constexpr ElementwiseKernels kernels{row_op, argmax};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
