// The feed-forward half of team_step.h: what all threads share in a step, and what a thread keeps for itself.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"
#include "team_products.h"

namespace moesaic {

// An expert that the token goes through.
struct ChosenExpert {
    const ExpertSlice* slice;
    std::int64_t number;
    float weight;
    Activation activation;
};

// What a thread works with; it outlives a step.
struct TeamMemory {
    AlignedArray<float> normed, products, gate, sums, shared, weights, query, key;
    AlignedArray<std::int64_t> indices;
    std::vector<ChosenExpert> chosen;
    OneToken token;
    Ahead ahead;
};

// What the experts of a step leave for down: a row of rounded activations, or floats, for each that was chosen.
struct InnerRows {
    ActivationGroup* groups;
    float* floats;
    std::int64_t stride;  // pairs of panels from row to row
};

// Sizes that buffers have to have for a block.
struct FeedForwardSizes {
    std::int64_t logits, num_chosen, pairs;
};
FeedForwardSizes sizes_of(const FeedForwardBlock& block);

// The block's stretches, by one thread of the team. own.normed is the normalised hidden state, and own.token too.
// logits: [router rows] and 16 more for the gate of shared experts.
void multiply_router(const FeedForwardBlock& block, const Team& team, WorkQueue& queue, TeamMemory& own, float* logits);
void choose_experts(const FeedForwardBlock& block, const float* logits, TeamMemory& own);
void expand_experts(const FeedForwardBlock& block, const Team& team, WorkQueue& queue, TeamMemory& own,
                    const InnerRows& inner);
void contract_experts(const FeedForwardBlock& block, const Team& team, WorkQueue& queue, TeamMemory& own,
                      const InnerRows& inner, const float* gate, float* x);

// What a thread reads first of a block, and of the down matrices of the chosen experts.
void add_router(Ahead& ahead, const FeedForwardBlock& block, const Team& team);
void add_down(Ahead& ahead, const FeedForwardBlock& block, const Team& team, const std::vector<ChosenExpert>& chosen);

}  // namespace moesaic
