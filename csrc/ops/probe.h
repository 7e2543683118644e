// What this machine can reach: the yardsticks that kernels are measured with.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

struct ProbeKernels {
    // Reads n floats (a multiple of 128); the sum keeps the compiler from leaving the reads out.
    float (*sum)(const float* p, int64_t n);
    // Independent multiply-adds in registers; each returns how many operations (2 per multiply-add) it did.
    int64_t (*multiply_add_f32)(int64_t rounds, float* sink);
    int64_t (*dot_i8)(int64_t rounds, float* sink);
    int64_t (*tile_bf16)(int64_t rounds, float* sink);  // null where the instruction set has no tiles
};
MOESAIC_DECLARE_KERNELS(ProbeKernels, probe_kernels)

struct Rates {
    double best, median;  // of the repetitions
};

// Rate in GB/s at which the team reads num_bytes of memory, each thread a part that it allocated and touched itself. It
// is that of DRAM only if num_bytes is several times the last-level caches. Repeats for about `seconds`, at least three
// times, each for a fixed time in which a thread reads what it can. Throws std::bad_alloc.
Rates read_bandwidth(int64_t num_bytes, double seconds);

enum class PeakKind : int32_t { kMultiplyAddF32 = 0, kDotI8 = 1, kTileBf16 = 2 };

// Rate in 10^9 operations per second of the whole team, from registers. Throws std::invalid_argument if the active
// instruction set has no such operation.
Rates peak_ops(PeakKind kind, double seconds);

}  // namespace moesaic
