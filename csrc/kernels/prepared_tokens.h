// The rows of activations of one call in the forms that its weight formats want.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/activations.h"
#include "kernels/matmul.h"
#include "kernels/scratch.h"

namespace moesaic {

// Forms beside the floats themselves, which are always there.
struct TokenForms {
    bool groups = false;                    // ActivationGroups
    bool bf16 = false, bf16_lower = false;  // Bf16Tokens, and their lower parts too

    // What a product of num_tokens tokens with a matrix of `cols` columns takes.
    void add(const MatmulKernels& kernels, bool quantized, std::int64_t cols, std::int64_t num_tokens) {
        const bool as_bf16 = wants_bf16(kernels, cols, num_tokens);
        groups |= quantized && !as_bf16;
        bf16 |= as_bf16;
        bf16_lower |= as_bf16 && kernels.wants_lower;
    }
};

class PreparedTokens {
  public:
    // Row i of num_rows has `cols` floats at row_address(i); they must outlive this object.
    // tiled_row(i): its place among the rows in bfloat16, which are num_tiled with the padding between groups of them.
    template <class RowAddress, class FirstTiled>
    PreparedTokens(std::int64_t num_rows, std::int64_t cols, TokenForms forms, RowAddress&& row_address,
                   std::int64_t num_tiled, FirstTiled&& tiled_row)
        : cols_(cols), forms_(forms), num_tiled_(num_tiled), float_rows_(static_cast<std::size_t>(num_rows)) {
        if (forms.bf16) {
            tiled_rows_.resize(float_rows_.size());
            for (std::int64_t i = 0; i < num_rows; ++i) tiled_rows_[static_cast<std::size_t>(i)] = tiled_row(i);
        }
        for (std::int64_t i = 0; i < num_rows; ++i) float_rows_[static_cast<std::size_t>(i)] = row_address(i);
        if (forms.groups || forms.bf16) convert_all();
    }

    // A pointer per row, as MatmulKernels::matmul takes them.
    const void* const* tokens(bool quantized) const { return quantized ? quantized_rows_.data() : float_rows_.data(); }

    // The rows from `first` on, the first of a tile, as MatmulKernels::matmul_bf16 takes them.
    Bf16Tokens bf16(std::int64_t first) const {
        const std::uint16_t* upper = upper_.data() + bf16_offset(first, 0, cols_);
        return {upper, forms_.bf16_lower ? upper + lower_offset_ : nullptr};
    }

  private:
    // On the thread pool if there is enough to do.
    void convert_all();
    void convert(std::int64_t row);

    // An odd distance between rows in cache lines: those of a block of tokens then fall into different sets.
    std::int64_t group_stride() const { return cols_ / kActivationGroup | 1; }

    std::int64_t cols_;
    TokenForms forms_;
    std::int64_t num_tiled_;
    std::vector<std::int64_t> tiled_rows_;
    AlignedArray<ActivationGroup> groups_;
    AlignedArray<std::uint16_t> upper_;
    std::int64_t lower_offset_ = 0;
    std::vector<const void*> quantized_rows_, float_rows_;
};

}  // namespace moesaic
