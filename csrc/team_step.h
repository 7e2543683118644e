// Blocks of layers for one token by a team of threads that stays together: between two stretches of work all meet once,
// and while a thread waits for the others it fetches what it will read next.
//
// A layer of grouped-query attention with routed experts has six such meetings, each where all threads need something
// of all others: queries and keys before attention, its result before the output matrix, the hidden state before the
// router, the router's logits before the experts, what these leave for down, and the hidden state of the next layer.
// Norms, rounding of activations, rotation and the choice of experts are done by every thread that needs them. Numbers
// are those of the blocks of blocks.h, to the bit, whatever the number of threads.
#pragma once

#include <span>

#include "blocks.h"

namespace moesaic {

// Half a layer: attention on its cache, or a feed-forward block; the other one is null.
struct LayerHalf {
    const AttentionBlock* attention;
    KeyValueCache cache;
    const FeedForwardBlock* feed_forward;
};

// Whether a half runs like this, for one token: attention on pages in place, experts that lie on one node.
bool runs_in_team(const AttentionBlock& block, const AttentionBlockCall& call);
bool runs_in_team(const FeedForwardBlock& block);

// call.out, the hidden state of one token, through all halves; of the call, all but x and the cache is read, and
// without attention only out.
void run_in_team(std::span<const LayerHalf> halves, const AttentionBlockCall& call);

}  // namespace moesaic
