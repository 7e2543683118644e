// Working memory of kernels that outlives a call, so that a decode step allocates nothing.
#pragma once

#include <cstdint>

namespace moesaic {

// At least `floats` floats, 64-byte aligned, of the calling thread; valid until its next call. Contents are arbitrary.
float* thread_scratch(int64_t floats);

// The same for memory that the caller of the thread pool shares with the team; apart from thread_scratch.
float* caller_scratch(int64_t floats);

}  // namespace moesaic
