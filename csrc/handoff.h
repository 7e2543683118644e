// Routed experts on the CPU inside a step that runs on a GPU: requests come through memory that both can see.
//
// The GPU writes a request's data and then its number; the thread that serves waits for that number, computes, and
// writes it back. Requests are numbered one after the other, over all layers and steps. Knows nothing of GPUs: only
// that somebody else writes `requested` with release and reads `answered` with acquire.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "deferral.h"
#include "moe.h"
#include "uploads.h"

namespace moesaic {

struct Mailbox {
    const std::int64_t* requested;  // number of the last request that is complete
    std::int64_t* answered;         // number of the last answer that is complete
    const float* hidden;            // [tokens, hidden]
    const std::int64_t* chosen;     // [tokens, top_k], all experts that the router chose
    const std::int64_t* experts;    // [tokens, top_k], those to compute here; any number outside the experts: none
    const float* weights;           // [tokens, top_k]
    float* output;                  // [tokens, hidden]
    std::int64_t max_tokens, hidden_size, top_k;
};

// What the other side expects to ask for, said before it knows: it is only for what can be undone.
struct Forecast {
    const std::int64_t* foretold =
        nullptr;  // number of the request of which the experts are; null: nothing is foretold
    const std::int64_t* experts =
        nullptr;  // [tokens, top_k], the surest of each token first; outside the experts: none
};

// What came of forecasts.
struct ForecastCounts {
    std::int64_t read = 0;   // experts that were read ahead
    std::int64_t asked = 0;  // of these, those that were to be computed, then
};

// A number above all others: whoever waits for an answer passes.
constexpr std::int64_t kGaveUp = std::numeric_limits<std::int64_t>::max();

// One layer of a step.
struct ServedLayer {
    const Experts* experts;
    std::uint32_t* uses;        // [num_experts], counts how often each was chosen; null: not counted
    std::int64_t num_deferred;  // experts of each token that come with the next answer; 0 for a step's last layer
    const UploadedLayer* uploaded = nullptr;  // where its experts are to be copied from; null: none ever is
};

// Nanoseconds of the steady clock at which a request was seen, at which it was answered, and at which what had been put
// off was computed, too.
struct ServedTimes {
    std::int64_t requested, answered, completed;
};

// Answer the requests first_request, first_request + 1, ..., one per layer. Returns the number of layers served: fewer
// than there are if a request did not come within `timeout_seconds`. Then, and when experts throw, `answered` becomes
// kGaveUp. `times` is empty or has an element for each layer. `deferral` is what the layer before the first one has put
// off, and then what the last one has. `uploads`: brings some of the experts to the other side; null: none. While a
// request is not there, but its forecast is, the experts of the latter are read ahead, and counted.
std::int64_t serve_experts(const Mailbox& mailbox, std::span<const ServedLayer> layers, std::int64_t first_request,
                           std::int64_t num_tokens, double timeout_seconds, std::span<ServedTimes> times,
                           Deferral& deferral, Uploads* uploads, const Forecast& forecast, ForecastCounts& counts);

}  // namespace moesaic
