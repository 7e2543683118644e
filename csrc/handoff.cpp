#include "handoff.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <vector>

#include "moe_ahead.h"
#include "spin.h"

namespace moesaic {

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kPausesPerLook = 64;  // at the clock

std::int64_t nanoseconds() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

std::int64_t seen(const std::int64_t* number) {
    // The other side writes to this word; atomic_ref takes no pointer to const.
    return std::atomic_ref<std::int64_t>(*const_cast<std::int64_t*>(number)).load(std::memory_order_acquire);
}

// Whether one of these numbers (the second may be null) is as large as `number` before the deadline.
bool wait_for(const std::int64_t* requested, const std::int64_t* foretold, std::int64_t number,
              Clock::time_point deadline) {
    bool arrived = false;
    int pauses = 0;
    spin_until(kPausesWithOwnCore, [&] {
        arrived = seen(requested) >= number || (foretold != nullptr && seen(foretold) >= number);
        if (arrived) return true;
        if (++pauses < kPausesPerLook) return false;
        pauses = 0;
        return Clock::now() >= deadline;
    });
    return arrived;
}

// The experts of a forecast, each once: what all tokens are surest of first.
std::vector<std::int64_t> likeliest(const Forecast& forecast, std::int64_t num_tokens, std::int64_t top_k,
                                    std::int64_t num_experts) {
    std::vector<std::int64_t> experts;
    for (std::int64_t rank = 0; rank < top_k; ++rank) {
        for (std::int64_t token = 0; token < num_tokens; ++token) {
            const std::int64_t expert = forecast.experts[token * top_k + rank];
            if (expert < 0 || expert >= num_experts) continue;
            if (std::find(experts.begin(), experts.end(), expert) == experts.end()) experts.push_back(expert);
        }
    }
    return experts;
}

// What a forecast lets do until the request is there: one expert may be sent to the other side, others are read ahead,
// and returned.
std::vector<std::int64_t> read_ahead(const Mailbox& m, const Forecast& forecast, const ServedLayer& layer,
                                     std::int64_t num_tokens, std::int64_t number, Uploads* uploads) {
    if (forecast.foretold == nullptr || seen(forecast.foretold) != number) return {};
    std::vector<std::int64_t> wanted = likeliest(forecast, num_tokens, m.top_k, layer.experts->num_experts);
    if (uploads == nullptr) return read_experts_ahead(*layer.experts, wanted, {m.requested, number});
    const auto sent = uploads->pick_ahead(*layer.uploaded, wanted, number);
    std::erase_if(wanted, [&](std::int64_t e) { return std::find(sent.begin(), sent.end(), e) != sent.end(); });
    const Beside send = [uploads] { uploads->send_ahead(); };
    return read_experts_ahead(*layer.experts, wanted, {m.requested, number}, &send);
}

// Whether the request came in time; in `ready` what was read ahead meanwhile.
bool await_request(const Mailbox& m, const Forecast& forecast, const ServedLayer& layer, std::int64_t num_tokens,
                   std::int64_t number, Clock::duration timeout, Uploads* uploads, std::vector<std::int64_t>& ready) {
    const Clock::time_point deadline = Clock::now() + timeout;
    if (!wait_for(m.requested, forecast.foretold, number, deadline)) return false;
    if (seen(m.requested) >= number) return true;
    ready = read_ahead(m, forecast, layer, num_tokens, number, uploads);
    return wait_for(m.requested, nullptr, number, deadline);
}

void check_request(const Mailbox& m, std::span<const ServedLayer> layers, std::int64_t num_tokens,
                   std::span<ServedTimes> times, const Uploads* uploads) {
    if (num_tokens < 1 || num_tokens > m.max_tokens) throw std::invalid_argument("more tokens than the mailbox holds");
    if (!times.empty() && times.size() != layers.size()) throw std::invalid_argument("expected times for every layer");
    for (const ServedLayer& layer : layers) {
        if (layer.experts->hidden != m.hidden_size) throw std::invalid_argument("experts of another width");
        if (uploads != nullptr && layer.uploaded == nullptr)
            throw std::invalid_argument("experts that cannot be copied");
    }
}

// After a failure nobody asks for what was put off, or sent.
void forget(Deferral& deferral, Uploads* uploads) {
    deferral.forget();
    if (uploads != nullptr) uploads->forget();
}

void count_asked(ForecastCounts& counts, const std::vector<std::int64_t>& ready, const Routing& routing,
                 std::int64_t num_tokens) {
    const std::int64_t* end = routing.experts + num_tokens * routing.top_k;
    counts.read += static_cast<std::int64_t>(ready.size());
    for (const std::int64_t expert : ready) counts.asked += std::find(routing.experts, end, expert) != end;
}

void count_uses(const ServedLayer& layer, const Mailbox& m, std::int64_t num_tokens) {
    if (layer.uses == nullptr) return;
    for (std::int64_t i = 0; i < num_tokens * m.top_k; ++i) {
        const std::int64_t expert = m.chosen[i];
        if (expert >= 0 && expert < layer.experts->num_experts) ++layer.uses[expert];
    }
}

}  // namespace

std::int64_t serve_experts(const Mailbox& m, std::span<const ServedLayer> layers, std::int64_t first_request,
                           std::int64_t num_tokens, double timeout_seconds, std::span<ServedTimes> times,
                           Deferral& deferral, Uploads* uploads, const Forecast& forecast, ForecastCounts& counts) {
    check_request(m, layers, num_tokens, times, uploads);
    const std::atomic_ref<std::int64_t> answered(*m.answered);
    const auto timeout = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_seconds));
    std::int64_t served = 0;
    const Beside send = [uploads] { uploads->send(); };
    const Beside* beside = uploads == nullptr ? nullptr : &send;
    try {
        for (const ServedLayer& layer : layers) {
            const std::int64_t number = first_request + served;
            std::vector<std::int64_t> ready;
            if (!await_request(m, forecast, layer, num_tokens, number, timeout, uploads, ready)) {
                forget(deferral, uploads);
                answered.store(kGaveUp, std::memory_order_release);
                return served;
            }
            const std::int64_t start = times.empty() ? 0 : nanoseconds();
            count_uses(layer, m, num_tokens);  // before the answer, after which the next request may come
            Routing routing{m.experts, m.weights, m.top_k};
            count_asked(counts, ready, routing, num_tokens);
            if (uploads != nullptr) {
                routing.experts =
                    uploads->pick(*layer.uploaded, routing, num_tokens, layer.experts->num_experts, number, ready);
            }
            if (layer.num_deferred > 0) {
                routing.experts = deferral.put_off(routing, m.hidden, num_tokens, layer.num_deferred);
            }
            moe_forward(*layer.experts, routing, m.hidden, m.hidden_size, num_tokens, m.output, beside, ready);
            deferral.deliver(m.output, num_tokens);
            answered.store(number, std::memory_order_release);
            const std::int64_t end = times.empty() ? 0 : nanoseconds();
            const bool was_deferred = deferral.compute(*layer.experts);  // while the other side goes on
            if (!times.empty()) {
                times[static_cast<std::size_t>(served)] = {start, end, was_deferred ? nanoseconds() : end};
            }
            ++served;
        }
    } catch (...) {
        forget(deferral, uploads);
        answered.store(kGaveUp, std::memory_order_release);
        throw;
    }
    return served;
}

}  // namespace moesaic
