// Whole matrices between rows of blocks (as files have them), panels of 16 rows (as kernels read them) and floats.
//
// A packed matrix is a sequence of panels, a panel a sequence of tiles (formats/layout.h). All run on the thread pool.
#pragma once

#include <cstdint>

#include "formats/registry.h"

namespace moesaic {

// src: rows of blocks of `source`, src_stride bytes apart. dst: format.packed_bytes(rows, cols). Throws
// std::invalid_argument where source is neither the format nor what it recodes.
void pack_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                 std::int64_t src_stride, std::uint8_t* dst, const FormatInfo& source);

inline void pack_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                        std::int64_t src_stride, std::uint8_t* dst) {
    pack_matrix(format, rows, cols, src, src_stride, dst, format);
}

// The inverse; dst rows are contiguous.
void unpack_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                   std::uint8_t* dst);

// Unpacked rows of blocks to float32 [rows, cols].
void dequantize_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                       float* dst);

// dst[i] = row ids[i] of the packed matrix, as float32 [num_ids, cols]. Throws std::out_of_range for an id outside it.
void gather_rows(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* packed,
                 const std::int64_t* ids, std::int64_t num_ids, float* dst);

}  // namespace moesaic
