#include "ops/scratch.h"

#include "kernels/scratch.h"

namespace moesaic {

float* thread_scratch(int64_t floats) {
    thread_local AlignedArray<float> memory;
    return memory.reserve(static_cast<std::size_t>(floats));
}

float* caller_scratch(int64_t floats) {
    thread_local AlignedArray<float> memory;
    return memory.reserve(static_cast<std::size_t>(floats));
}

}  // namespace moesaic
