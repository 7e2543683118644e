#include "ops/route.h"

#include "ops/rows.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(RouteKernels, route_kernels)

void route(const RouteArgs& a) {
    const auto token = route_kernels().token;
    // Choosing costs several passes over the logits.
    for_rows(a.num_tokens, 32 * a.num_experts, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) token(a, i);
    });
}

}  // namespace moesaic
