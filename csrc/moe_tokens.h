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

// An expert's rows as a thread has them: pointers, or tiles in bfloat16 of its own.
struct ExpertRows {
    std::int64_t active = -1;  // whose rows the tiles are; -1: nobody's
    AlignedArray<std::uint16_t> tiles;
    std::vector<const void*> pointers;
};

// Input of gate and up. Each token is prepared once, and experts point to theirs. Products in bfloat16 take rows that
// lie one after the other: a thread makes them for an expert when it comes to it, in its second-level cache. Where an
// expert has more than kOwnTokens tokens, which several threads share, rows are laid out by expert for all threads.
class SlotTokens {
  public:
    template <class RowAddress>
    SlotTokens(const Assignment& assignment, std::initializer_list<const FormatInfo*> formats, std::int64_t cols,
               std::int64_t num_tokens, RowAddress&& row_address)
        : a_(assignment),
          kernels_(matmul_table().formats),
          cols_(cols),
          forms_(forms_of_all(assignment, formats, cols)),
          by_slot_(forms_.bf16 && assignment.num_slots(0) > kOwnTokens),
          rows_(
              by_slot_ ? static_cast<std::int64_t>(assignment.slots.size()) : num_tokens, cols,
              by_slot_ ? forms_ : TokenForms{forms_.groups, false, false},
              [&](std::int64_t i) {
                  return row_address(by_slot_ ? assignment.slots[static_cast<std::size_t>(i)].token : i);
              },
              assignment.num_tiled,
              [&](std::int64_t i) { return assignment.tiled_slots[static_cast<std::size_t>(i)]; }) {}

    // The rows of an expert as the kernel of a format takes them; `own` must outlive the use.
    ExpertTokens of_expert(std::int64_t active, const FormatInfo& format, ExpertRows& own) const;

  private:
    static constexpr std::int64_t kOwnTokens = 256;

    static TokenForms forms_of_all(const Assignment& assignment, std::initializer_list<const FormatInfo*> formats,
                                   std::int64_t cols);
    Bf16Tokens tiles_of(std::int64_t active, ExpertRows& own) const;

    const Assignment& a_;
    const MatmulKernels* kernels_;  // those of the caller, who may do without tiles
    std::int64_t cols_;
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
