#include "paged_model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "block_steps.h"
#include "packing.h"

namespace moesaic {

namespace {

void scale_all(float* values, std::int64_t count, float factor) {
    if (factor == 1.0f) return;
    std::transform(values, values + count, values, [factor](float v) { return v * factor; });
}

}  // namespace

void PagedModel::decode(const DecodeTokens& tokens, float* logits) const {
    const std::int64_t count = tokens.count, hidden = embedding.cols;
    thread_local AlignedArray<std::int32_t> kept_starts;
    std::int32_t* starts = kept_starts.reserve(static_cast<std::size_t>(count + 1));
    std::iota(starts, starts + count + 1, 0);
    const PagedStep step{
        {tokens.tables, tokens.table_width, stack->block_size, tokens.lengths, starts}, count, tokens.slots};
    check_paged_step(step, count, tokens.table_width, stack->num_blocks);
    thread_local AlignedArray<float> kept;  // Buffers are the blocks' own, call by call
    float* x = kept.reserve(static_cast<std::size_t>(count * 2 * (hidden + num_pairs)));
    float* normed = x + count * hidden;
    float* angles = normed + count * hidden;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t position = tokens.positions[i];
        if (position < 0 || position >= num_positions) {
            throw std::invalid_argument("position " + std::to_string(position) + " of " +
                                        std::to_string(num_positions));
        }
        std::copy_n(cos + position * num_pairs, num_pairs, angles + i * num_pairs);
        std::copy_n(sin + position * num_pairs, num_pairs, angles + (count + i) * num_pairs);
    }
    gather_rows(*embedding.format, embedding.rows, hidden, embedding.weights, tokens.ids, count, x);
    scale_all(x, count * hidden, embedding_scale);

    AttentionBlockCall call{};
    call.x = call.out = x;
    call.batch = 1;
    call.num_tokens = count;
    call.cos = angles;
    call.sin = angles + count * num_pairs;
    call.angle_stride = {0, num_pairs, 1};
    call.paged = &step;
    stack->run(call, 0, static_cast<std::int64_t>(stack->caches.size()));

    normalize(norm, x, hidden, count, hidden, normed);
    const LinearJob last = job_of(head, logits);
    linear({&last, 1}, {normed, hidden}, count);
    scale_all(logits, count * head.rows, logit_scale);
}

}  // namespace moesaic
