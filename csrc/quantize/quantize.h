// Float rows to blocks, in parallel over rows.
#pragma once

#include <cstdint>
#include <vector>

namespace moesaic::quantize {

// ggml numbers of the formats that can be written.
std::vector<int> writable_types();

// The largest magnitude a weight may have in this format: float16 scales end at 65504. Throws std::invalid_argument for
// a format that cannot be written.
float largest_magnitude(int ggml_type);

// Quantises src [rows, cols] into dst [rows, row bytes]. `importance` [cols] weighs squared errors; nullptr: all alike.
// Returns -1, or the first row with a weight that is not finite or above largest_magnitude; dst is then incomplete.
// Throws std::invalid_argument for a format that cannot be written. cols must be a multiple of the block size.
std::int64_t quantize_rows(int ggml_type, std::int64_t rows, std::int64_t cols, std::int64_t row_bytes,
                           const float* src, const float* importance, std::uint8_t* dst);

}  // namespace moesaic::quantize
