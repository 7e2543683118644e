// Experts that will probably be asked for next, read into the caches of the threads that would compute them while
// nobody asks for anything yet. Only memory is touched: answers are the same whether it was right or not.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moe.h"

namespace moesaic {

// Somebody else's number, which ends the reading when it is as large as this.
struct Until {
    const std::int64_t* word;
    std::int64_t number;
};

// Read gates and ups, the experts one after the other, each thread its pairs of them (pairs_to_read), until all is
// read, the caches hold no more, or the number comes. Returns those of `wanted` that were begun, at most; an id outside
// [0, num_experts) ends the list. `beside` runs once, in the calling thread, before it reads; null: nothing.
std::vector<std::int64_t> read_experts_ahead(const Experts& experts, std::span<const std::int64_t> wanted, Until until,
                                             const Beside* beside = nullptr);

}  // namespace moesaic
