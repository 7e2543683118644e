#include "packing.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "thread_pool.h"

namespace moesaic {

namespace {

// Bytes that one turn of a worker moves: long enough to pay for the turn, short enough to balance.
constexpr std::int64_t kTurnBytes = 1 << 16;

std::int64_t items_per_turn(std::int64_t bytes_per_item) {
    return std::max<std::int64_t>(1, kTurnBytes / bytes_per_item);
}

}  // namespace

void pack_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                 std::int64_t src_stride, std::uint8_t* dst, const FormatInfo& source) {
    check_matrix(format, rows, cols);
    const bool recodes = source.index != format.index;
    if (recodes && format.recodes != source.ggml_type) {
        throw std::invalid_argument(std::string(format.name) + " is no other form of " + source.name);
    }
    const std::int64_t row_bytes = format.row_bytes(cols);
    const std::int64_t bytes = format.panel_bytes(cols), num_panels = (rows + 15) / 16;
    thread_pool().parallel_for(num_panels, items_per_turn(bytes), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> recoded(recodes ? static_cast<std::size_t>(bytes) : 0);
        for (std::int64_t p = begin; p < end; ++p) {
            const int here = static_cast<int>(std::min<std::int64_t>(16, rows - 16 * p));
            const std::uint8_t* panel = src + 16 * p * src_stride;
            for (int row = 0; recodes && row < here; ++row) {
                format.recode_row(panel + row * src_stride, cols, recoded.data() + row * row_bytes);
            }
            format.pack_panel(recodes ? recoded.data() : panel, recodes ? row_bytes : src_stride, here, cols,
                              dst + p * bytes);
        }
    });
}

void unpack_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                   std::uint8_t* dst) {
    check_matrix(format, rows, cols);
    const std::int64_t row_bytes = format.row_bytes(cols), panel_bytes = format.panel_bytes(cols);
    thread_pool().parallel_for(rows, items_per_turn(row_bytes), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            format.unpack_row(src + r / 16 * panel_bytes, static_cast<int>(r % 16), cols, dst + r * row_bytes);
        }
    });
}

void dequantize_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* src,
                       float* dst) {
    check_matrix(format, rows, cols);
    const std::int64_t row_bytes = format.row_bytes(cols);
    thread_pool().parallel_for(rows, items_per_turn(row_bytes), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) format.dequantize_row(src + r * row_bytes, cols, dst + r * cols);
    });
}

void gather_rows(const FormatInfo& format, std::int64_t rows, std::int64_t cols, const std::uint8_t* packed,
                 const std::int64_t* ids, std::int64_t num_ids, float* dst) {
    check_matrix(format, rows, cols);
    for (std::int64_t i = 0; i < num_ids; ++i) {
        if (ids[i] < 0 || ids[i] >= rows) {
            throw std::out_of_range("row " + std::to_string(ids[i]) + " of a matrix with " + std::to_string(rows) +
                                    " rows");
        }
    }
    const std::int64_t row_bytes = format.row_bytes(cols), panel_bytes = format.panel_bytes(cols);
    thread_pool().parallel_for(num_ids, items_per_turn(row_bytes), [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::uint8_t> row(static_cast<std::size_t>(row_bytes));
        for (std::int64_t i = begin; i < end; ++i) {
            format.unpack_row(packed + ids[i] / 16 * panel_bytes, static_cast<int>(ids[i] % 16), cols, row.data());
            format.dequantize_row(row.data(), cols, dst + i * cols);
        }
    });
}

}  // namespace moesaic
