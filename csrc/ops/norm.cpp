#include "ops/norm.h"

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(NormKernels, norm_kernels)

void rms_norm(const NormArgs& a) {
    const auto rows = norm_kernels().rms_rows;
    for_rows(a.num_rows, a.width, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

void layer_norm(const NormArgs& a) {
    const auto rows = norm_kernels().layer_rows;
    for_rows(a.num_rows, a.width, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

}  // namespace moesaic
