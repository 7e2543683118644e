#include "quantize/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

#include "quantize/blocks.h"
#include "thread_pool.h"

namespace moesaic::quantize {
namespace {

constexpr float kLargestHalf = 65504.0F;
constexpr float kLargestBfloat16 = 0x1.FEp127F;

struct Row {
    int ggml_type;
    float largest;
    RowQuantizer quantize;
};

// The one list of formats that can be written.
constexpr Row kRows[] = {
    {0, std::numeric_limits<float>::max(), quantize_f32},
    {1, kLargestHalf, quantize_f16},
    {2, kLargestHalf, quantize_q4_0},
    {3, kLargestHalf, quantize_q4_1},
    {6, kLargestHalf, quantize_q5_0},
    {7, kLargestHalf, quantize_q5_1},
    {8, kLargestHalf, quantize_q8_0},
    {10, kLargestHalf, quantize_q2_k},
    {11, kLargestHalf, quantize_q3_k},
    {12, kLargestHalf, quantize_q4_k},
    {13, kLargestHalf, quantize_q5_k},
    {14, kLargestHalf, quantize_q6_k},
    {20, kLargestHalf, quantize_iq4_nl},
    {23, kLargestHalf, quantize_iq4_xs},
    {30, kLargestBfloat16, quantize_bf16},
    {39, kLargestHalf, quantize_mxfp4},
};

const Row& find(int ggml_type) {
    for (const Row& row : kRows) {
        if (row.ggml_type == ggml_type) return row;
    }
    throw std::invalid_argument("no quantiser for ggml type " + std::to_string(ggml_type));
}

// Compares bit patterns, so that NaN and infinity count as larger than every limit; integers also vectorise.
bool all_at_most(const float* x, std::int64_t count, float largest) {
    std::uint32_t top = 0;
    for (std::int64_t i = 0; i < count; ++i) top = std::max(top, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffU);
    return top <= std::bit_cast<std::uint32_t>(largest);
}

void lower(std::atomic<std::int64_t>& first_bad, std::int64_t row) {
    std::int64_t seen = first_bad.load();
    while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
    }
}

}  // namespace

std::vector<int> writable_types() {
    std::vector<int> types;
    for (const Row& row : kRows) types.push_back(row.ggml_type);
    return types;
}

float largest_magnitude(int ggml_type) { return find(ggml_type).largest; }

std::int64_t quantize_rows(int ggml_type, std::int64_t rows, std::int64_t cols, std::int64_t row_bytes,
                           const float* src, const float* importance, std::uint8_t* dst) {
    constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
    constexpr std::int64_t kChunkWeights = 1 << 16;  // some milliseconds of work: balances without contention
    const Row& row = find(ggml_type);
    std::atomic<std::int64_t> first_bad{kNone};
    const std::int64_t chunk = std::max<std::int64_t>(1, kChunkWeights / std::max<std::int64_t>(1, cols));
    thread_pool().parallel_for(rows, chunk, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            const float* x = src + r * cols;
            if (!all_at_most(x, cols, row.largest)) return lower(first_bad, r);
            row.quantize(x, importance, cols, dst + r * row_bytes);
        }
    });
    return first_bad == kNone ? -1 : first_bad.load();
}

}  // namespace moesaic::quantize
