// Latent attention of a part of a prompt over keys and values that are expanded from the latents: see
// latent_attention_block.cpp for the absorbed form, in which latents are what queries meet.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace moesaic {

// Whether so many queries at the end of so many keys cost less expanded, on pages: the one place that decides it. A
// pair of a query and a key takes nope + rope + value products per head instead of 2 latent + rope; each key, instead
// of each query, takes latent (nope + value) before that.
bool expanding_pays(const LatentAttentionBlock& block, const AttentionBlockCall& call, std::int64_t num_queries,
                    std::int64_t num_keys);

// attended [tokens, heads * value] of the tokens of one sequence of a paged call, whose keys are in the cache; q
// [tokens, heads * (nope + rope)] and attended are those of all tokens of the call.
void attend_expanded(const LatentAttentionBlock& block, const AttentionBlockCall& call, std::int64_t sequence,
                     const float* q, float* attended);

}  // namespace moesaic
