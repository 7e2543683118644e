// Decoder layers one after the other, each an attention block of either kind and a feed-forward block; see blocks.h.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"

namespace moesaic {

struct DecoderStack {
    struct Layer {
        const AttentionBlock* attention;  // one of the two
        const LatentAttentionBlock* latent_attention;
        const FeedForwardBlock* feed_forward;
    };
    std::vector<Layer> layers;

    // All layers; x stays as it is. Layers with even numbers write to outputs[0], those with odd ones to outputs[1].
    void run(AttentionBlockCall call, const std::vector<KeyValueCache>& caches, float* (&outputs)[2]) const;
    void run_attention(std::size_t layer, const AttentionBlockCall& call) const;
};

// The same on a cache in pages, for any number of sequences and tokens at once.
struct PagedStack {
    const DecoderStack* stack;
    std::vector<KeyValueCache> caches;  // of all layers
    std::int64_t block_size, num_blocks;

    // Layers [first, first + count), in place: call.x is call.out, and call.cache is not used.
    void run(AttentionBlockCall call, std::int64_t first, std::int64_t count) const;

    // The last layer for the last token of each sequence alone: call.out is [sequences, hidden]. Other tokens leave
    // keys and values, since nothing else of them is ever asked for; call.x stays as it is. Every sequence has a token.
    void finish(const AttentionBlockCall& call) const;
};

// Throws std::invalid_argument unless the starts, lengths, tables and slots of a step belong to its tokens and lie in a
// pool of num_blocks. table_width: entries of a table.
void check_paged_step(const PagedStep& step, std::int64_t num_tokens, std::int64_t table_width,
                      std::int64_t num_blocks);

}  // namespace moesaic
