#include "ops/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace moesaic {

namespace {

class Buffer {
  public:
    float* at_least(int64_t floats) {
        if (floats > capacity_) {
            memory_.reset();
            capacity_ = 0;
            const std::size_t bytes = (static_cast<std::size_t>(floats) * sizeof(float) + 63) / 64 * 64;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (!memory_) throw std::bad_alloc();
            capacity_ = floats;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t capacity_ = 0;
};

}  // namespace

float* thread_scratch(int64_t floats) {
    thread_local Buffer buffer;
    return buffer.at_least(floats);
}

float* caller_scratch(int64_t floats) {
    thread_local Buffer buffer;
    return buffer.at_least(floats);
}

}  // namespace moesaic
