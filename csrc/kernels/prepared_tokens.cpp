#include "kernels/prepared_tokens.h"

#include "thread_pool.h"

namespace moesaic {

namespace {

// Below this many values, one thread quantises faster than a team meets.
constexpr std::int64_t kAloneValues = 1 << 15;

}  // namespace

void PreparedTokens::quantize_all() {
    const auto num_rows = static_cast<std::int64_t>(float_rows_.size());
    // An odd distance between rows in cache lines: those of a block of tokens then fall into different sets.
    const std::int64_t stride = groups_ | 1;
    ActivationGroup* groups = storage_.reserve(static_cast<std::size_t>(num_rows * stride));
    quantized_rows_.resize(float_rows_.size());
    const ActivationKernels& kernels = activation_kernels();
    auto quantize = [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            quantized_rows_[static_cast<std::size_t>(i)] = groups + i * stride;
            kernels.quantize(static_cast<const float*>(float_rows_[static_cast<std::size_t>(i)]), groups_,
                             groups + i * stride);
        }
    };
    if (num_rows * groups_ * kActivationGroup <= kAloneValues) {
        quantize(0, num_rows);
    } else {
        thread_pool().parallel_for(num_rows, 4, quantize);
    }
}

}  // namespace moesaic
