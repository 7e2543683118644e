#include "samples.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>
#include <string>

#include "packing.h"

namespace check {

using moesaic::FormatInfo;

std::uint64_t Random::bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

float Random::normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
}

std::vector<float> normals(Random& random, std::int64_t count, double scale) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& x : values) x = static_cast<float>(random.normal() * scale);
    return values;
}

std::vector<float> activations(Random& random, std::int64_t rows, std::int64_t cols) {
    std::vector<float> x = normals(random, rows * cols);
    for (float& value : x) value *= random.below(100) == 0 ? 20.0f : 1.0f;
    if (rows > 2) std::fill_n(x.begin() + cols, cols, 0.0f);
    return x;
}

AlignedBytes aligned_bytes(std::int64_t size) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<std::size_t>(size)) != 0) throw std::bad_alloc();
    return AlignedBytes(static_cast<std::uint8_t*>(p));
}

namespace {

constexpr float kLargest = 2.0f, kOrdinary = 0.125f;  // bounds of the largest weight of a block
constexpr int kMostTries = 100000;

// The largest magnitude in a block, or infinity if one is not finite.
float largest_weight(const FormatInfo& format, const std::uint8_t* block, std::vector<float>& values) {
    values.resize(static_cast<std::size_t>(format.block));
    format.dequantize_row(block, format.block, values.data());
    float largest = 0.0f;
    for (float value : values) {
        if (!std::isfinite(value)) return INFINITY;
        largest = std::max(largest, std::fabs(value));
    }
    return largest;
}

// One block whose largest weight is in [least, most].
void random_block(const FormatInfo& format, float least, float most, Random& random, std::uint8_t* block) {
    std::vector<float> values;
    for (int i = 0; i < kMostTries; ++i) {
        for (int b = 0; b < format.block_bytes; ++b) block[b] = static_cast<std::uint8_t>(random.bits() >> 56);
        const float largest = largest_weight(format, block, values);
        if (largest >= least && largest <= most) return;
    }
    throw std::runtime_error(std::string("no block of random bytes of ") + format.name + " has usable weights");
}

}  // namespace

std::vector<std::uint8_t> random_blocks(const FormatInfo& format, std::int64_t num_blocks, Random& random) {
    // Good blocks are rare where the bytes hold exponents: a few are found and used again and again.
    const std::int64_t size = format.block_bytes, num_found = format.block == 1 ? 300 : 24;
    std::vector<std::uint8_t> found(static_cast<std::size_t>(num_found * size));
    for (std::int64_t i = 0; i < num_found; ++i) {
        const bool faint = i % 8 == 7 && format.quantized;
        random_block(format, faint ? 0.0f : kOrdinary, faint ? kOrdinary : kLargest, random, &found[i * size]);
    }
    std::vector<std::uint8_t> blocks(static_cast<std::size_t>(num_blocks * size));
    for (std::int64_t i = 0; i < num_blocks; ++i) {
        std::copy_n(&found[random.below(num_found) * size], size, &blocks[i * size]);
    }
    return blocks;
}

Matrices::Matrices(const FormatInfo& info, std::int64_t num_rows, std::int64_t num_cols, std::int64_t num_matrices,
                   std::uint64_t seed)
    : format(&info),
      rows(num_rows),
      cols(num_cols),
      count(num_matrices),
      matrix_bytes(count == 1 ? info.packed_bytes(rows, cols) : (info.packed_bytes(rows, cols) + 63) / 64 * 64),
      packed(aligned_bytes(count * matrix_bytes)),
      values(static_cast<std::size_t>(count * rows * cols)) {
    Random random(seed);
    raw = random_blocks(info, count * rows * cols / info.block, random);
    const std::int64_t raw_bytes = rows * info.row_bytes(cols);
    for (std::int64_t i = 0; i < count; ++i) {
        moesaic::pack_matrix(info, rows, cols, &raw[i * raw_bytes], info.row_bytes(cols),
                             packed.get() + i * matrix_bytes);
    }
    for (std::int64_t r = 0; r < count * rows; ++r) {
        info.dequantize_row(&raw[r * info.row_bytes(cols)], cols, &values[r * cols]);
    }
}

}  // namespace check
