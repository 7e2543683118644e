#include "uploads.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moesaic {

namespace {

// With what share of surest experts being asked for, sending them pays: one for nothing takes as long as one gains.
constexpr float kMostlyRight = 0.8f;
constexpr float kNewest = 1.0f / 32;  // weight of a request

}  // namespace

void CopyQueue::put(std::uint64_t to, const void* from, std::int64_t num_bytes) const {
    const int status = copy(to, from, static_cast<std::size_t>(num_bytes), queue);
    if (status != 0) {
        throw CopyRefused("the driver refused to copy " + std::to_string(num_bytes) + " bytes to the GPU: status " +
                          std::to_string(status));
    }
}

std::int64_t Uploads::wanted(std::size_t num_distinct) const {
    const std::int64_t number = numbers_.empty() ? 0 : numbers_[std::min(num_distinct, numbers_.size() - 1)];
    const std::int64_t most = std::min<std::int64_t>(static_cast<std::int64_t>(num_distinct), landing_.num_slots);
    return std::clamp<std::int64_t>(number, 0, most);
}

std::span<const std::int64_t> Uploads::pick_ahead(const UploadedLayer& layer, std::span<const std::int64_t> likely,
                                                  std::int64_t number) {
    layer_ = &layer;
    foretold_ = number;
    surest_ = likely.empty() ? -1 : likely.front();
    ahead_.clear();
    if (right_ >= kMostlyRight && wanted(likely.size()) > 0) ahead_.push_back(surest_);
    return ahead_;
}

void Uploads::send_ahead() const {
    for (std::size_t slot = 0; slot < ahead_.size(); ++slot) {
        const Brought brought{ahead_[slot], static_cast<std::int64_t>(slot)};
        for (const UploadedMatrices* matrices : {&layer_->gate, &layer_->up, &layer_->down}) put(*matrices, brought);
    }
}

void Uploads::find_candidates(const Routing& routing, std::int64_t num_choices, std::int64_t num_experts,
                              std::span<const std::int64_t> ready) {
    candidates_.clear();
    for (std::int64_t i = 0; i < num_choices; ++i) {
        const std::int64_t expert = routing.experts[i];
        if (expert < 0 || expert >= num_experts) continue;
        const auto known = std::find_if(candidates_.begin(), candidates_.end(),
                                        [&](const Candidate& c) { return c.expert == expert; });
        if (known != candidates_.end()) {
            ++known->tokens;
        } else {
            const bool is_ready = std::find(ready.begin(), ready.end(), expert) != ready.end();
            candidates_.push_back({expert, i, 1, is_ready});
        }
    }
}

// Of what was sent ahead for this request, what it asks for is brought: no candidate any more.
void Uploads::take_ahead(std::int64_t number) {
    brought_.clear();
    if (foretold_ != number) ahead_.clear();
    if (foretold_ == number && surest_ >= 0) {
        const bool is_right = std::any_of(candidates_.begin(), candidates_.end(),
                                          [&](const Candidate& c) { return c.expert == surest_; });
        right_ += kNewest * ((is_right ? 1.0f : 0.0f) - right_);
    }
    for (std::size_t slot = 0; slot < ahead_.size(); ++slot) {
        const auto found = std::find_if(candidates_.begin(), candidates_.end(),
                                        [&](const Candidate& c) { return c.expert == ahead_[slot]; });
        if (found == candidates_.end()) continue;
        brought_.push_back({found->expert, static_cast<std::int64_t>(slot)});
        candidates_.erase(found);
    }
    num_sent_ = brought_.size();
    num_ahead_ += static_cast<std::int64_t>(ahead_.size());
    num_asked_ += static_cast<std::int64_t>(num_sent_);
}

const std::int64_t* Uploads::pick(const UploadedLayer& layer, const Routing& routing, std::int64_t num_tokens,
                                  std::int64_t num_experts, std::int64_t number, std::span<const std::int64_t> ready) {
    const std::int64_t top_k = landing_.top_k, num_choices = num_tokens * top_k;
    if (num_tokens > landing_.max_tokens || routing.top_k != top_k) {
        throw std::invalid_argument("more tokens or experts than can be brought");
    }
    layer_ = &layer;
    find_candidates(routing, num_choices, num_experts, ready);
    const std::size_t distinct = candidates_.size();
    take_ahead(number);
    // Slots of what was sent for nothing are still being written to.
    const auto first_slot = static_cast<std::int64_t>(ahead_.size());
    const auto count = static_cast<std::size_t>(std::clamp<std::int64_t>(
        wanted(distinct) - static_cast<std::int64_t>(num_sent_), 0, landing_.num_slots - first_slot));
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count), candidates_.end(),
                      [](const Candidate& a, const Candidate& b) {
                          if (a.is_ready != b.is_ready) return b.is_ready;
                          return a.tokens != b.tokens ? a.tokens > b.tokens : a.first_choice < b.first_choice;
                      });
    for (std::size_t i = 0; i < count; ++i) {
        brought_.push_back({candidates_[i].expert, first_slot + static_cast<std::int64_t>(i)});
    }
    left_.assign(routing.experts, routing.experts + num_choices);
    std::int32_t* slots = layer.record.slots;
    std::fill_n(slots, landing_.max_tokens * top_k, -1);
    for (std::int64_t i = 0; i < num_choices; ++i) {
        std::int64_t& expert = left_[static_cast<std::size_t>(i)];
        const auto found =
            std::find_if(brought_.begin(), brought_.end(), [&](const Brought& b) { return b.expert == expert; });
        if (expert < 0 || found == brought_.end()) continue;
        slots[i] = static_cast<std::int32_t>(found->slot);
        expert = -1;
    }
    *layer.record.number = number;
    ahead_.clear();
    num_missing_ += static_cast<std::int64_t>(distinct);
    num_brought_ += static_cast<std::int64_t>(brought_.size());
    return left_.data();
}

void Uploads::send() const {
    const UploadRecord& record = layer_->record;
    queue_.put(landing_.slots, record.slots, landing_.max_tokens * landing_.top_k * std::int64_t{sizeof(std::int32_t)});
    put_new(layer_->gate);
    put_new(layer_->up);
    queue_.put(landing_.inner_arrived, record.number, sizeof(std::int64_t));
    put_new(layer_->down);
    queue_.put(landing_.down_arrived, record.number, sizeof(std::int64_t));
}

void Uploads::bring(const UploadedLayer& layer, const std::vector<std::int64_t>& experts) const {
    if (static_cast<std::int64_t>(experts.size()) > landing_.num_slots) {
        throw std::invalid_argument("more experts than there are slots");
    }
    for (const UploadedMatrices* matrices : {&layer.gate, &layer.up, &layer.down}) {
        for (std::size_t slot = 0; slot < experts.size(); ++slot) {
            put(*matrices, {experts[slot], static_cast<std::int64_t>(slot)});
        }
    }
}

// What was not sent ahead.
void Uploads::put_new(const UploadedMatrices& m) const {
    for (std::size_t i = num_sent_; i < brought_.size(); ++i) put(m, brought_[i]);
}

void Uploads::put(const UploadedMatrices& m, const Brought& brought) const {
    if (m.first == nullptr) return;
    const auto at = static_cast<std::uint64_t>(brought.slot * landing_.slot_bytes + m.offset);
    queue_.put(landing_.arena + at, m.first + brought.expert * m.matrix_bytes, m.matrix_bytes);
}

}  // namespace moesaic
