// Routed experts that a step brings to a device instead of computing them on the CPU: which, and their way there.
//
// Copies go through a queue of the device, which carries them out in order while the CPU computes what is left. The
// device is told where an expert of a token lands, and then, twice, that what was put into the queue before is there:
// first gates and ups, then downs. Knows no devices: the queue is somebody else's.
//
// If a request is foretold, the expert that it will surest bring is put into the queue before it comes, as long as such
// experts mostly were asked for: one that is not was copied for nothing, and those behind it come later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "moe.h"

namespace moesaic {

// Whoever made the queue did not take note of a copy.
struct CopyRefused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Copies to memory of a device, in order; `copy` returns 0 when it has taken note of one, and does not wait for it.
struct CopyQueue {
    int (*copy)(std::uint64_t to, const void* from, std::size_t num_bytes, void* queue);
    void* queue;

    void put(std::uint64_t to, const void* from, std::int64_t num_bytes) const;  // or CopyRefused
};

// A projection of a layer's experts in DRAM, one after the other, and where it goes in a slot.
struct UploadedMatrices {
    const std::uint8_t* first;  // null: there is no such projection
    std::int64_t matrix_bytes;
    std::int64_t offset;  // from the beginning of a slot
};

// What the device is told of a layer's request, in memory that copies read: nobody writes to it until the next step.
struct UploadRecord {
    std::int64_t* number;  // of the request
    std::int32_t* slots;   // [max_tokens, top_k], the slot of each choice; -1: it does not come
};

struct UploadedLayer {
    UploadedMatrices gate, up, down;
    UploadRecord record;
};

// Where experts land, and where the device looks for what it is told: addresses of the device.
struct Landing {
    std::uint64_t arena;          // [num_slots, slot_bytes]
    std::uint64_t slots;          // int32 [max_tokens, top_k]
    std::uint64_t inner_arrived;  // int64, number of the last request whose gates and ups are there
    std::uint64_t down_arrived;   // the same of downs
    std::int64_t slot_bytes, num_slots, max_tokens, top_k;
};

class Uploads {
  public:
    Uploads(CopyQueue queue, Landing landing) : queue_(queue), landing_(landing) {}

    // From the next request on: how many experts are brought if 0, 1, ... distinct ones are to be computed; the last
    // number holds for more.
    void set_numbers(std::vector<std::int32_t> numbers) { numbers_ = std::move(numbers); }

    // A request is foretold: `likely`, each once, the surest first. Returns what is to be sent before it comes, perhaps
    // nothing; valid until the next call.
    std::span<const std::int64_t> pick_ahead(const UploadedLayer& layer, std::span<const std::int64_t> likely,
                                             std::int64_t number);

    // Put that into the queue.
    void send_ahead() const;

    // No request will come for what was picked ahead: numbers begin anew.
    void forget() {
        foretold_ = 0;
        ahead_.clear();
    }

    // Choose what is brought of a request: what was sent already, then experts that most tokens chose, and of these
    // whose first choice comes first; those that were read ahead (`ready`) only if there are too few others. Returns
    // the experts that are left to compute, valid until the next call.
    const std::int64_t* pick(const UploadedLayer& layer, const Routing& routing, std::int64_t num_tokens,
                             std::int64_t num_experts, std::int64_t number, std::span<const std::int64_t> ready = {});

    // Put what was picked last into the queue, and what the device is told.
    void send() const;

    // Put experts into the queue, into the first slots; the device is told nothing.
    void bring(const UploadedLayer& layer, const std::vector<std::int64_t>& experts) const;

    std::int64_t num_missing() const { return num_missing_; }  // distinct experts that were to be computed so far
    std::int64_t num_brought() const { return num_brought_; }  // of these
    std::int64_t num_ahead() const { return num_ahead_; }      // experts that were sent before their request
    std::int64_t num_asked() const { return num_asked_; }      // of these, those that were to be computed, then

  private:
    struct Candidate {
        std::int64_t expert, first_choice, tokens;
        bool is_ready;
    };
    struct Brought {
        std::int64_t expert, slot;
    };
    std::int64_t wanted(std::size_t num_distinct) const;
    void find_candidates(const Routing& routing, std::int64_t num_choices, std::int64_t num_experts,
                         std::span<const std::int64_t> ready);
    void take_ahead(std::int64_t number);
    void put(const UploadedMatrices& matrices, const Brought& brought) const;
    void put_new(const UploadedMatrices& matrices) const;

    CopyQueue queue_;
    Landing landing_;
    std::vector<std::int32_t> numbers_;
    std::vector<Candidate> candidates_;
    std::vector<std::int64_t> left_;
    std::vector<Brought> brought_;  // those that were sent ahead first
    std::size_t num_sent_ = 0;      // of these
    const UploadedLayer* layer_ = nullptr;
    // Of the request that was foretold last.
    std::int64_t foretold_ = 0, surest_ = -1;
    std::vector<std::int64_t> ahead_;
    float right_ = 0.0f;  // share of requests that asked for what was surest; newer ones count more
    std::int64_t num_missing_ = 0, num_brought_ = 0, num_ahead_ = 0, num_asked_ = 0;
};

}  // namespace moesaic
