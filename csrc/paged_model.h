// Decode steps of a whole model on a cache in pages, each as one call: embedding, layers, last norm and head for one
// new token of each of some sequences.
//
// It adds no arithmetic to that of the layers and of kernels/; what it saves is the way back to the caller in between.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "decoder_stack.h"

namespace moesaic {

// One new token of each sequence, and where its keys and values go.
struct DecodeTokens {
    const std::int64_t* ids;        // [count]
    const std::int64_t* positions;  // [count] in its sequence
    const std::int64_t* slots;      // [count] block * block_size + offset
    const std::int32_t* tables;     // [count, table_width] block numbers
    std::int64_t table_width;
    const std::int32_t* lengths;  // [count] positions of the sequence, the new one included
    std::int64_t count;
};

struct PagedModel {
    const PagedStack* stack;
    PackedMatrix embedding;
    float embedding_scale;
    NormWeight norm;
    PackedMatrix head;
    float logit_scale;
    const float* cos;  // [num_positions, num_pairs] rotary angles
    const float* sin;
    std::int64_t num_positions, num_pairs;

    // logits: [count, head.rows]. Numbers are those that the parts give one after the other. Throws
    // std::invalid_argument for tokens that do not go together, std::out_of_range for an id that the model does not
    // have; nothing was written then.
    void decode(const DecodeTokens& tokens, float* logits) const;
};

}  // namespace moesaic
