// Memory that a thread will read soon, fetched into the second-level cache while it waits for others.
#pragma once

#include <algorithm>
#include <cstdint>

namespace moesaic {

// To be called again and again (Team::barrier(idle)): a few cache lines each time, part by part.
class ReadAhead {
  public:
    // At most so many bytes, which a cache can keep beside what else is read meanwhile.
    explicit ReadAhead(std::int64_t most_bytes = kMostBytes) : bytes_left_(most_bytes) {}

    // Parts beyond the first few and beyond what a cache can keep are left out.
    void add(const std::uint8_t* begin, std::int64_t num_bytes) {
        num_bytes = std::min(num_bytes, bytes_left_);
        if (num_parts_ == kMostParts || num_bytes <= 0) return;
        parts_[num_parts_++] = {begin, begin + num_bytes};
        bytes_left_ -= num_bytes;
    }

    bool is_done() const { return current_ == num_parts_; }

    void operator()() {
        for (int lines = 0; lines < kLines && current_ < num_parts_; ++lines) {
            Part& part = parts_[current_];
            __builtin_prefetch(part.begin, 0, 2);
            part.begin += 64;
            if (part.begin >= part.end) ++current_;
        }
    }

  private:
    static constexpr int kLines = 8, kMostParts = 16;
    static constexpr std::int64_t kMostBytes = 256 << 10;

    struct Part {
        const std::uint8_t *begin, *end;
    };
    Part parts_[kMostParts];
    int num_parts_ = 0, current_ = 0;
    std::int64_t bytes_left_;
};

}  // namespace moesaic
