#include "formats/registry.h"

#include <iterator>
#include <stdexcept>
#include <string>

#include "formats/formats.h"

namespace moesaic {

namespace {

enum class Direction { kPack, kUnpack };

template <Direction direction, int kUnit>
void move_units(std::uint8_t* block, std::uint8_t* tile, int row, int count) {
    for (int j = 0; j < count; ++j) {
        std::uint8_t* b = block + j * kUnit;
        std::uint8_t* t = tile + (j * kTileRows + row) * kUnit;
        if constexpr (direction == Direction::kPack) {
            memcpy(t, b, kUnit);
        } else {
            memcpy(b, t, kUnit);
        }
    }
}

template <Direction direction>
void move_bit_plane(std::uint8_t* block, std::uint8_t* tile, int row) {
    std::uint8_t* t = tile + 4 * row;
    std::uint32_t word;
    memcpy(&word, direction == Direction::kPack ? block : t, sizeof(word));
    word = direction == Direction::kPack ? transpose_bits(word) : untranspose_bits(word);
    memcpy(direction == Direction::kPack ? t : block, &word, sizeof(word));
}

template <Direction direction>
void move_paired_nibbles(std::uint8_t* block, std::uint8_t* tile, int row, int num_bytes) {
    for (int first = 0; first < num_bytes; first += 16, block += 16, tile += 16 * kTileRows) {
        std::uint8_t parted[16];
        if constexpr (direction == Direction::kPack) {
            part_nibbles(block, parted);
            move_units<direction, 4>(parted, tile, row, 4);
        } else {
            move_units<direction, 4>(parted, tile, row, 4);
            pair_nibbles(parted, block);
        }
    }
}

// One block of one row into its tile, or back.
template <Direction direction, std::size_t kNumFields>
void move_block(const Field (&fields)[kNumFields], std::uint8_t* block, std::uint8_t* tile, int row) {
    for (const Field& field : fields) {
        std::uint8_t* part = block + field.offset;
        if (field.is_bit_plane) {
            move_bit_plane<direction>(part, tile, row);
        } else if (field.has_paired_nibbles) {
            move_paired_nibbles<direction>(part, tile, row, field.bytes);
        } else if (field.unit == 4) {
            move_units<direction, 4>(part, tile, row, field.bytes / 4);
        } else if (field.unit == 2) {
            move_units<direction, 2>(part, tile, row, field.bytes / 2);
        } else {
            move_units<direction, 1>(part, tile, row, field.bytes);
        }
        tile += kTileRows * field.bytes;
    }
}

// move_block() for a format whose fields have other bits in tiles than in blocks.
template <class F, Direction direction>
void move_converted_block(std::uint8_t* block, std::uint8_t* tile, int row) {
    if constexpr (direction == Direction::kPack) {
        std::uint8_t copy[F::kBlockBytes];
        memcpy(copy, block, sizeof(copy));
        F::to_tile(copy);
        move_block<direction>(F::kFields, copy, tile, row);
    } else {
        move_block<direction>(F::kFields, block, tile, row);
        F::from_tile(block);
    }
}

template <class F, Direction direction>
void move_row(std::uint8_t* blocks, std::uint8_t* panel, int row, std::int64_t cols) {
    std::int64_t k = 0;
    if constexpr (requires { F::kPairFields; }) {
        for (; k + 2 <= cols; k += 2) {
            move_block<direction>(F::kPairFields, blocks + k * F::kBlockBytes, panel + k * F::kBlockBytes * kTileRows,
                                  row);
        }
    }
    for (; k < cols; k += F::kBlock) {
        const std::int64_t at = k / F::kBlock * F::kBlockBytes;
        if constexpr (requires { F::to_tile(blocks); }) {
            move_converted_block<F, direction>(blocks + at, panel + at * kTileRows, row);
        } else {
            move_block<direction>(F::kFields, blocks + at, panel + at * kTileRows, row);
        }
    }
}

template <class F>
void pack_panel(const std::uint8_t* src, std::int64_t stride, int num_rows, std::int64_t cols, std::uint8_t* dst) {
    if (num_rows < kTileRows) memset(dst, 0, static_cast<std::size_t>(cols / F::kBlock * F::kBlockBytes * kTileRows));
    for (int row = 0; row < num_rows; ++row) {
        // The blocks are only read when packing.
        move_row<F, Direction::kPack>(const_cast<std::uint8_t*>(src + row * stride), dst, row, cols);
    }
}

template <class F>
void unpack_row(const std::uint8_t* panel, int row, std::int64_t cols, std::uint8_t* dst) {
    // The panel is only read when unpacking.
    move_row<F, Direction::kUnpack>(dst, const_cast<std::uint8_t*>(panel), row, cols);
}

template <class F>
constexpr int recodes() {
    if constexpr (requires { typename F::Source; }) return F::Source::kGgmlType;
    return -1;
}

template <class F>
constexpr auto recode_row() -> decltype(FormatInfo::recode_row) {
    if constexpr (requires { typename F::Source; }) {
        static_assert(F::Source::kBlock == F::kBlock);
        return [](const std::uint8_t* src, std::int64_t cols, std::uint8_t* dst) {
            for (std::int64_t k = 0; k < cols; k += F::kBlock, src += F::Source::kBlockBytes, dst += F::kBlockBytes) {
                F::recode(src, dst);
            }
        };
    }
    return nullptr;
}

template <class F>
void dequantize_row(const std::uint8_t* src, std::int64_t cols, float* dst) {
    for (std::int64_t k = 0; k < cols; k += F::kBlock, src += F::kBlockBytes) F::dequantize(src, dst + k);
}

enum FormatIndex {
#define X(F) k##F##Index,
    MOESAIC_FOR_EACH_FORMAT(X)
#undef X
};

template <class F>
constexpr int field_bytes() {
    int bytes = 0;
    for (const Field& field : F::kFields) bytes += field.bytes;
    return bytes;
}

#define X(F) static_assert(field_bytes<F>() == F::kBlockBytes, "the fields of " #F " do not make up its block");
MOESAIC_FOR_EACH_FORMAT(X)
#undef X

template <class F>
constexpr FormatInfo info_of(int index) {
    FormatInfo info{index,
                    F::kName,
                    F::kGgmlType,
                    F::kBlock,
                    F::kBlockBytes,
                    F::kQuantized,
                    recodes<F>(),
                    pack_panel<F>,
                    unpack_row<F>,
                    recode_row<F>(),
                    dequantize_row<F>,
                    nullptr,
                    0};
    if constexpr (requires { F::kNumbers; }) {
        info.grid_places = F::kNumbers.places;
        info.num_grid_places = static_cast<int>(std::size(F::kNumbers.places));
    }
    return info;
}

#define X(F) info_of<F>(k##F##Index),
constexpr FormatInfo kFormats[] = {MOESAIC_FOR_EACH_FORMAT(X)};
#undef X

constexpr bool numbers_differ() {
    for (const FormatInfo& a : kFormats) {
        for (const FormatInfo& b : kFormats) {
            if (a.index != b.index && a.ggml_type == b.ggml_type) return false;
        }
    }
    return true;
}
static_assert(numbers_differ(), "two formats have the same number");

}  // namespace

int num_formats() { return static_cast<int>(std::size(kFormats)); }

const FormatInfo& format_at(int index) { return kFormats[index]; }

const FormatInfo& format_info(int ggml_type) {
    for (const FormatInfo& format : kFormats) {
        if (format.ggml_type == ggml_type) return format;
    }
    throw std::invalid_argument("no weight format has the ggml number " + std::to_string(ggml_type));
}

void check_matrix(const FormatInfo& format, std::int64_t rows, std::int64_t cols) {
    if (rows < 1 || cols < 1 || cols % format.block != 0) {
        throw std::invalid_argument("a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) + " in " +
                                    format.name + ": expected at least one row and a multiple of " +
                                    std::to_string(format.block) + " columns");
    }
}

}  // namespace moesaic
