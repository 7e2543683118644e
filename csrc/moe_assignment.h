// Which tokens go to which expert: the router's choices sorted by expert. Knows no weights.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace moesaic {

// A token's choice of an expert.
struct Slot {
    std::int64_t token;
    float weight;
};

// The slots sorted by expert: those of active expert a are [first[a], first[a + 1]).
struct Assignment {
    std::vector<std::int64_t> experts;  // active ones, those with most tokens first: no long item starts last
    // The same from the first expert to the last: in this order a token's experts are summed, which so does not depend
    // on how many other tokens chose them.
    std::vector<std::int64_t> by_number;
    std::vector<std::int64_t> first;
    std::vector<Slot> slots;
    // Where slots are when those of each expert begin with a tile of rows (Bf16Tokens), and how many places there are.
    std::vector<std::int64_t> tiled_slots;
    std::int64_t num_tiled = 0;

    std::int64_t num_active() const { return static_cast<std::int64_t>(experts.size()); }
    std::int64_t num_slots(std::int64_t active) const {
        const auto a = static_cast<std::size_t>(active);
        return first[a + 1] - first[a];
    }
};

Assignment assign(const Routing& routing, std::int64_t num_tokens, std::int64_t num_experts);

}  // namespace moesaic
