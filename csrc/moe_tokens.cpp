#include "moe_tokens.h"

#include <algorithm>
#include <cstring>

#include "kernels/activations.h"

namespace moesaic {

TokenForms forms_of(const Assignment& assignment, const FormatInfo& format, std::int64_t cols) {
    const MatmulKernels& kernels = matmul_table().formats[format.index];
    TokenForms forms;
    if (assignment.num_active() == 0) return forms;
    forms.add(kernels, format.quantized, cols, assignment.num_slots(0));  // of the expert with most tokens
    forms.add(kernels, format.quantized, cols, assignment.num_slots(assignment.num_active() - 1));
    return forms;
}

TokenForms SlotTokens::forms_of_all(const Assignment& assignment, std::initializer_list<const FormatInfo*> formats,
                                    std::int64_t cols) {
    TokenForms all;
    for (const FormatInfo* format : formats) {
        if (format == nullptr) continue;
        const TokenForms forms = forms_of(assignment, *format, cols);
        all.groups |= forms.groups;
        all.bf16 |= forms.bf16;
        all.bf16_lower |= forms.bf16_lower;
    }
    return all;
}

// In the thread's own memory, unless they are there. Tile by tile and 256 columns at a time, so that what is written
// stays in the first-level cache until it is full lines.
Bf16Tokens SlotTokens::tiles_of(std::int64_t active, ExpertRows& own) const {
    constexpr std::int64_t kSteps = 8;
    const std::int64_t count = a_.num_slots(active), size = padded_tokens(count) * cols_;
    std::uint16_t* upper = own.tiles.reserve(static_cast<std::size_t>(size * (forms_.bf16_lower ? 2 : 1)));
    const Bf16Tokens tiles{upper, forms_.bf16_lower ? upper + size : nullptr};
    if (own.active == active) return tiles;
    own.active = active;
    const ActivationKernels& kernels = activation_kernels();
    const Slot* slots = &a_.slots[static_cast<std::size_t>(a_.first[static_cast<std::size_t>(active)])];
    for (std::int64_t tile = 0; tile < count; tile += kTokenPadding) {
        for (std::int64_t step = 0; step < cols_ / kBf16Step; step += kSteps) {
            for (std::int64_t i = tile; i < std::min(count, tile + kTokenPadding); ++i) {
                const auto* x = static_cast<const float*>(rows_.tokens(false)[slots[i].token]) + step * kBf16Step;
                std::uint16_t* to = upper + bf16_offset(i, step, cols_);
                kernels.to_bf16(x, std::min(kSteps, cols_ / kBf16Step - step), kTokenPadding * kBf16Step, to,
                                tiles.lower != nullptr ? to + size : nullptr);
            }
        }
    }
    return tiles;
}

ExpertTokens SlotTokens::of_expert(std::int64_t active, const FormatInfo& format, ExpertRows& own) const {
    const std::int64_t count = a_.num_slots(active), first = a_.first[static_cast<std::size_t>(active)];
    const void* const* all = rows_.tokens(format.quantized);
    if (by_slot_) return {count, all + first, rows_.bf16(a_.tiled_slots[static_cast<std::size_t>(first)])};
    if (wants_bf16(kernels_[format.index], cols_, count)) return {count, nullptr, tiles_of(active, own)};
    own.pointers.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
        own.pointers[static_cast<std::size_t>(i)] = all[a_.slots[static_cast<std::size_t>(first + i)].token];
    }
    return {count, own.pointers.data(), {}};
}

InnerTokens::InnerTokens(const FormatInfo& format, std::int64_t cols, const Assignment& assignment)
    : a_(assignment),
      format_(format),
      kernels_(matmul_table().formats[format.index]),
      cols_(cols),
      stride_((cols + kPair - 1) / kPair | 1),
      forms_(forms_of(assignment, format, cols)) {
    const auto size = static_cast<std::size_t>(stride_) * assignment.slots.size();
    if (forms_.groups) groups_.reserve(size);
    if (!format.quantized) floats_.reserve(size * kPair);
    if (forms_.bf16) {
        lower_offset_ = assignment.num_tiled * cols;
        upper_.reserve(static_cast<std::size_t>(lower_offset_ * (forms_.bf16_lower ? 2 : 1)));
    }
}

void InnerTokens::store(std::int64_t slot, std::int64_t pair, const float* values, std::int64_t count) {
    const ActivationKernels& kernels = activation_kernels();
    const std::int64_t at = slot * stride_ + pair;
    if (wants_bf16(kernels_, cols_, count)) {
        const std::int64_t row = a_.tiled_slots[static_cast<std::size_t>(slot)];
        std::uint16_t* upper = upper_.data() + bf16_offset(row, pair, cols_);
        kernels.to_bf16(values, 1, 0, upper, forms_.bf16_lower ? upper + lower_offset_ : nullptr);
    } else if (format_.quantized) {
        kernels.quantize(values, 1, groups_.data() + at);
    } else {
        std::memcpy(floats_.data() + at * kPair, values, kPair * sizeof(float));
    }
}

ExpertTokens InnerTokens::of_expert(std::int64_t first, std::int64_t count, std::vector<const void*>& pointers) const {
    if (wants_bf16(kernels_, cols_, count)) {
        const std::int64_t row = a_.tiled_slots[static_cast<std::size_t>(first)];
        const std::uint16_t* upper = upper_.data() + bf16_offset(row, 0, cols_);
        return {count, nullptr, {upper, forms_.bf16_lower ? upper + lower_offset_ : nullptr}};
    }
    pointers.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = (first + i) * stride_;
        pointers[static_cast<std::size_t>(i)] =
            format_.quantized ? static_cast<const void*>(groups_.data() + at) : floats_.data() + at * kPair;
    }
    return {count, pointers.data(), {}};
}

}  // namespace moesaic
