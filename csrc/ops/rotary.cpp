#include "ops/rotary.h"

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(RotaryKernels, rotary_kernels)

void norm_and_rotate(const RotaryArgs& a) {
    const auto token = rotary_kernels().token;
    const int64_t floats = a.q.num_heads * a.q.head_dim + a.k.num_heads * a.k.head_dim;
    for_rows(a.batch * a.num_tokens, floats, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) token(a, i / a.num_tokens, i % a.num_tokens);
    });
}

}  // namespace moesaic
