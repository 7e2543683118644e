// Routed experts that come one layer late: of each token's those with the lowest weights, whose weighted sum is part of
// the next answer instead of their own layer's. Knows neither mailboxes nor who waits for answers.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace moesaic {

// What one layer of a step leaves for the next.
class Deferral {
  public:
    Deferral(std::int64_t max_tokens, std::int64_t hidden_size, std::int64_t top_k);

    // Put off the `count` experts of each token whose weights are lowest, as far as they are to be computed at all;
    // of equal weights the later ones. Keeps what is needed to compute them. Returns the other experts, which are valid
    // until the next call. x is [num_tokens, hidden_size].
    const std::int64_t* put_off(const Routing& routing, const float* x, std::int64_t num_tokens, std::int64_t count);

    // Compute what was put off; whether there was anything.
    bool compute(const Experts& experts);

    // Add what was computed to out[num_tokens, hidden_size], once; nothing if nothing was put off.
    void deliver(float* out, std::int64_t num_tokens);

    // Nobody will want what was put off.
    void forget();

  private:
    std::int64_t max_tokens_, hidden_size_, top_k_;
    std::vector<std::int64_t> now_, later_;  // experts, [max_tokens, top_k]; -1: none
    std::vector<float> weights_, x_, sum_;
    std::int64_t waiting_ = 0, computed_ = 0;  // tokens of what was put off, and of its sum; 0: there is none
};

}  // namespace moesaic
