// The rows that experts multiply, in the forms that their kernels take: the tokens of the call for gate and up, and
// what those leave for down. Knows the assignment of tokens to experts, but no weights.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "formats/registry.h"
#include "kernels/matmul.h"
#include "kernels/prepared_tokens.h"
#include "kernels/scratch.h"
#include "moe_assignment.h"

namespace moesaic {

constexpr std::int64_t kPair = kOutputStride;  // rows of an item of gate and up: two panels, one activation group

// The tokens of one expert.
struct ExpertTokens {
    std::int64_t count;
    const void* const* rows;  // pointers, as MatmulKernels::matmul takes them
    Bf16Tokens bf16;          // set if MatmulKernels::matmul_bf16 is to be used
};

// The forms that the experts of an assignment want for a matrix with these many columns.
TokenForms forms_of(const Assignment& assignment, const FormatInfo& format, std::int64_t cols);

// Input of gate and up. Products in bfloat16 take rows that lie one after the other: rows are laid out by expert if
// there are any; otherwise each token is prepared once and experts point to theirs.
class SlotTokens {
  public:
    template <class RowAddress>
    SlotTokens(const Assignment& assignment, std::initializer_list<const FormatInfo*> formats, std::int64_t cols,
               std::int64_t num_tokens, RowAddress&& row_address)
        : a_(assignment),
          forms_(forms_of_all(assignment, formats, cols)),
          by_slot_(forms_.bf16),
          rows_(
              by_slot_ ? static_cast<std::int64_t>(assignment.slots.size()) : num_tokens, cols, forms_,
              [&](std::int64_t i) {
                  return row_address(by_slot_ ? assignment.slots[static_cast<std::size_t>(i)].token : i);
              },
              assignment.num_tiled,
              [&](std::int64_t i) { return assignment.tiled_slots[static_cast<std::size_t>(i)]; }) {}

    // `pointers` is scratch that must outlive the use.
    ExpertTokens of_expert(std::int64_t active, bool quantized, std::vector<const void*>& pointers) const;

  private:
    static TokenForms forms_of_all(const Assignment& assignment, std::initializer_list<const FormatInfo*> formats,
                                   std::int64_t cols);

    const Assignment& a_;
    TokenForms forms_;
    bool by_slot_;
    PreparedTokens rows_;
};

// Input of down: a row for every slot, filled in pieces of kPair values by several threads.
class InnerTokens {
  public:
    InnerTokens(const FormatInfo& format, std::int64_t cols, const Assignment& assignment);

    // Values [pair * kPair, ...) of a slot whose expert has `count` tokens.
    void store(std::int64_t slot, std::int64_t pair, const float* values, std::int64_t count);

    // The rows of `count` slots from `first` on; `pointers` is scratch that must outlive the use.
    ExpertTokens of_expert(std::int64_t first, std::int64_t count, std::vector<const void*>& pointers) const;

  private:
    const Assignment& a_;
    const FormatInfo& format_;
    const MatmulKernels& kernels_;
    std::int64_t cols_;
    std::int64_t stride_;  // pairs from slot to slot; odd, so that slots fall into different cache sets
    std::int64_t lower_offset_ = 0;
    TokenForms forms_;
    AlignedArray<float> floats_;
    AlignedArray<ActivationGroup> groups_;
    AlignedArray<std::uint16_t> upper_;
};

}  // namespace moesaic
