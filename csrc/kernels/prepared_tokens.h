// The rows of activations of one call in the forms that its weight formats want, with pointers to each token.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/activations.h"
#include "kernels/scratch.h"

namespace moesaic {

class PreparedTokens {
  public:
    // Row i of num_rows has `cols` floats at row_address(i); they must outlive this object.
    template <class RowAddress>
    PreparedTokens(std::int64_t num_rows, std::int64_t cols, bool quantized, RowAddress&& row_address)
        : groups_(cols / kActivationGroup), float_rows_(static_cast<std::size_t>(num_rows)) {
        for (std::int64_t i = 0; i < num_rows; ++i) float_rows_[static_cast<std::size_t>(i)] = row_address(i);
        if (quantized) quantize_all();
    }

    // A pointer per row, as MatmulKernels::matmul takes them.
    const void* const* tokens(bool quantized) const { return quantized ? quantized_rows_.data() : float_rows_.data(); }

  private:
    // On the thread pool if there is enough to do.
    void quantize_all();

    std::int64_t groups_;
    AlignedArray<ActivationGroup> storage_;
    std::vector<const void*> quantized_rows_, float_rows_;
};

}  // namespace moesaic
