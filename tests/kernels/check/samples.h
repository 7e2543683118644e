// Random weights and activations, the same on every machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "formats/registry.h"

namespace check {

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t bits();
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(bits() >> 1) % n; }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    float normal();

  private:
    std::uint64_t state_;
};

std::vector<float> normals(Random& random, std::int64_t count, double scale = 1.0);

// [rows, cols] with outliers; row 1 is zero if there are more than two.
std::vector<float> activations(Random& random, std::int64_t rows, std::int64_t cols);

// Weights in no more memory than they take, aligned as kernels want them: a sanitizer sees the first byte beyond.
struct Freed {
    void operator()(std::uint8_t* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<std::uint8_t[], Freed>;
AlignedBytes aligned_bytes(std::int64_t size);

// Equal matrices, as rows of blocks, packed, and as the floats that the format's own dequantize() reads.
struct Matrices {
    Matrices(const moesaic::FormatInfo& format, std::int64_t rows, std::int64_t cols, std::int64_t count,
             std::uint64_t seed);

    const moesaic::FormatInfo* format;
    std::int64_t rows, cols, count;
    std::int64_t matrix_bytes;  // between packed matrices
    std::vector<std::uint8_t> raw;
    AlignedBytes packed;
    std::vector<float> values;  // [count, rows, cols]
};

// Rows of blocks of random bytes, out of which the format reads finite weights: mostly of a size that weights have, now
// and then zero or tiny. Throws std::runtime_error if the format has hardly any such block.
std::vector<std::uint8_t> random_blocks(const moesaic::FormatInfo& format, std::int64_t num_blocks, Random& random);

// Is there a matrix of this format with so many columns?
inline bool fits(const moesaic::FormatInfo& format, std::int64_t cols) { return cols % format.block == 0; }

}  // namespace check
