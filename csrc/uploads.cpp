#include "uploads.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moesaic {

void CopyQueue::put(std::uint64_t to, const void* from, std::int64_t num_bytes) const {
    const int status = copy(to, from, static_cast<std::size_t>(num_bytes), queue);
    if (status != 0) {
        throw CopyRefused("the driver refused to copy " + std::to_string(num_bytes) + " bytes to the GPU: status " +
                          std::to_string(status));
    }
}

const std::int64_t* Uploads::pick(const UploadedLayer& layer, const Routing& routing, std::int64_t num_tokens,
                                  std::int64_t num_experts, std::int64_t number, std::span<const std::int64_t> ready) {
    const std::int64_t top_k = landing_.top_k, num_choices = num_tokens * top_k;
    if (num_tokens > landing_.max_tokens || routing.top_k != top_k) {
        throw std::invalid_argument("more tokens or experts than can be brought");
    }
    layer_ = &layer;
    left_.assign(routing.experts, routing.experts + num_choices);
    candidates_.clear();
    for (std::int64_t i = 0; i < num_choices; ++i) {
        const std::int64_t expert = left_[static_cast<std::size_t>(i)];
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
    const std::size_t distinct = candidates_.size();
    const std::int64_t wanted = numbers_.empty() ? 0 : numbers_[std::min(distinct, numbers_.size() - 1)];
    const auto count = static_cast<std::size_t>(std::clamp<std::int64_t>(
        wanted, 0, std::min<std::int64_t>(static_cast<std::int64_t>(distinct), landing_.num_slots)));
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count), candidates_.end(),
                      [](const Candidate& a, const Candidate& b) {
                          if (a.is_ready != b.is_ready) return b.is_ready;
                          return a.tokens != b.tokens ? a.tokens > b.tokens : a.first_choice < b.first_choice;
                      });
    brought_.clear();
    for (std::size_t slot = 0; slot < count; ++slot) brought_.push_back(candidates_[slot].expert);
    std::int32_t* slots = layer.record.slots;
    std::fill_n(slots, landing_.max_tokens * top_k, -1);
    for (std::int64_t i = 0; i < num_choices; ++i) {
        std::int64_t& expert = left_[static_cast<std::size_t>(i)];
        const auto found = std::find(brought_.begin(), brought_.end(), expert);
        if (expert < 0 || found == brought_.end()) continue;
        slots[i] = static_cast<std::int32_t>(found - brought_.begin());
        expert = -1;
    }
    *layer.record.number = number;
    num_missing_ += static_cast<std::int64_t>(distinct);
    num_brought_ += static_cast<std::int64_t>(count);
    return left_.data();
}

void Uploads::send() const {
    const UploadRecord& record = layer_->record;
    queue_.put(landing_.slots, record.slots, landing_.max_tokens * landing_.top_k * std::int64_t{sizeof(std::int32_t)});
    put(layer_->gate, brought_);
    put(layer_->up, brought_);
    queue_.put(landing_.inner_arrived, record.number, sizeof(std::int64_t));
    put(layer_->down, brought_);
    queue_.put(landing_.down_arrived, record.number, sizeof(std::int64_t));
}

void Uploads::bring(const UploadedLayer& layer, const std::vector<std::int64_t>& experts) const {
    if (static_cast<std::int64_t>(experts.size()) > landing_.num_slots) {
        throw std::invalid_argument("more experts than there are slots");
    }
    for (const UploadedMatrices* matrices : {&layer.gate, &layer.up, &layer.down}) put(*matrices, experts);
}

void Uploads::put(const UploadedMatrices& m, const std::vector<std::int64_t>& experts) const {
    if (m.first == nullptr) return;
    for (std::size_t slot = 0; slot < experts.size(); ++slot) {
        const auto at = static_cast<std::uint64_t>(static_cast<std::int64_t>(slot) * landing_.slot_bytes + m.offset);
        queue_.put(landing_.arena + at, m.first + experts[slot] * m.matrix_bytes, m.matrix_bytes);
    }
}

}  // namespace moesaic
