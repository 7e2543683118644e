// The formats as data: what code outside the kernels knows of them.
#pragma once

#include <cstdint>

namespace moesaic {

struct FormatInfo {
    int index;  // position in the list of formats.h
    const char* name;
    int ggml_type;
    int block;        // weights per block along a row
    int block_bytes;  // bytes per block
    bool quantized;   // its products take activations rounded to int8, not floats
    int recodes;      // number of the format of files whose blocks it holds in another form, or -1

    // One panel: rows [0, num_rows) of `src` (row stride in bytes) become 16 packed rows; missing ones are zero blocks.
    void (*pack_panel)(const std::uint8_t* src, std::int64_t stride, int num_rows, std::int64_t cols,
                       std::uint8_t* dst);
    // The inverse, for one of the 16 rows.
    void (*unpack_row)(const std::uint8_t* panel, int row, std::int64_t cols, std::uint8_t* dst);
    // One row of blocks of the format that it recodes; null without one.
    void (*recode_row)(const std::uint8_t* src, std::int64_t cols, std::uint8_t* dst);
    // One row of blocks to floats.
    void (*dequantize_row)(const std::uint8_t* src, std::int64_t cols, float* dst);

    // By number in packed rows: the place of an entry of the codebook in the published grid. Null if that is the
    // number.
    const std::uint16_t* grid_places;
    int num_grid_places;

    std::int64_t row_bytes(std::int64_t cols) const { return cols / block * block_bytes; }
    std::int64_t panel_bytes(std::int64_t cols) const { return 16 * row_bytes(cols); }
    // Bytes of a packed matrix: rows are padded to a multiple of 16.
    std::int64_t packed_bytes(std::int64_t rows, std::int64_t cols) const {
        return (rows + 15) / 16 * panel_bytes(cols);
    }
};

int num_formats();
const FormatInfo& format_at(int index);

// The format with this number in ggml. Throws std::invalid_argument for one that is not in the list.
const FormatInfo& format_info(int ggml_type);

// Throws std::invalid_argument unless rows, cols >= 1 and cols is a multiple of the block.
void check_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols);

}  // namespace moesaic
