#include "kernels/prepared_tokens.h"

#include "thread_pool.h"

namespace moesaic {

namespace {

// Below this many values, one thread converts faster than a team meets.
constexpr std::int64_t kAloneValues = 1 << 15;

}  // namespace

void PreparedTokens::convert(std::int64_t row) {
    const auto* x = static_cast<const float*>(float_rows_[static_cast<std::size_t>(row)]);
    const ActivationKernels& kernels = activation_kernels();
    if (forms_.groups) {
        ActivationGroup* groups = groups_.data() + row * group_stride();
        quantized_rows_[static_cast<std::size_t>(row)] = groups;
        kernels.quantize(x, cols_ / kActivationGroup, groups);
    }
    if (forms_.bf16) {
        std::uint16_t* upper = upper_.data() + bf16_offset(tiled_rows_[static_cast<std::size_t>(row)], 0, cols_);
        kernels.to_bf16(x, cols_ / kBf16Step, kTokenPadding * kBf16Step, upper,
                        forms_.bf16_lower ? upper + lower_offset_ : nullptr);
    }
}

void PreparedTokens::convert_all() {
    const auto num_rows = static_cast<std::int64_t>(float_rows_.size());
    if (forms_.groups) {
        groups_.reserve(static_cast<std::size_t>(num_rows * group_stride()));
        quantized_rows_.resize(float_rows_.size());
    }
    if (forms_.bf16) {
        lower_offset_ = padded_tokens(num_tiled_) * cols_;
        upper_.reserve(static_cast<std::size_t>(lower_offset_ * (forms_.bf16_lower ? 2 : 1)));
    }
    if (num_rows * cols_ <= kAloneValues) {
        for (std::int64_t i = 0; i < num_rows; ++i) convert(i);
    } else {
        thread_pool().parallel_for(num_rows, 4, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) convert(i);
        });
    }
}

}  // namespace moesaic
