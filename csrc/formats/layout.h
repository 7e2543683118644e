// How a block of a row becomes part of a tile: the words in which format headers describe their layout.
//
// A tile is 16 blocks, one of each of 16 rows. A format lists the fields of its block in the order in which the tile
// has them; inside a field, the units of 1, 2 or 4 bytes of the 16 rows lie side by side:
//
//   tile[16 * field start + (16 * j + row) * unit ...] = block[field.offset + j * unit ...]
//
// so a field of 4-byte units is a sequence of 64-byte vectors, 16 rows x 4 bytes, one lane per row.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moesaic {

constexpr int kTileRows = 16;

struct Field {
    int offset;  // in the block
    int bytes;
    int unit;
    bool is_bit_plane = false;  // one 32-bit word, bit k for weight k; in the tile, byte b has bit i for weight 4 i + b
    // 16 bytes for every 32 weights, of which byte b has 2 b and 2 b + 1; in the tile, byte j has weights j and j + 16
    bool has_paired_nibbles = false;
};

namespace {

constexpr uint32_t transpose_bits(uint32_t word) {
    uint32_t out = 0;
    for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < 4; ++b) out |= (word >> (4 * i + b) & 1u) << (8 * b + i);
    }
    return out;
}

constexpr uint32_t untranspose_bits(uint32_t word) {
    uint32_t out = 0;
    for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < 4; ++b) out |= (word >> (8 * b + i) & 1u) << (4 * i + b);
    }
    return out;
}

// 32 weights of 4 bits: from byte b with weights 2 b and 2 b + 1 to byte j with weights j and j + 16.
inline void part_nibbles(const uint8_t* paired, uint8_t* out) {
    for (int b = 0; b < 8; ++b) {
        out[2 * b] = static_cast<uint8_t>((paired[b] & 15) | paired[b + 8] << 4);
        out[2 * b + 1] = static_cast<uint8_t>(paired[b] >> 4 | (paired[b + 8] & 0xf0));
    }
}

// The inverse.
inline void pair_nibbles(const uint8_t* parted, uint8_t* out) {
    for (int b = 0; b < 8; ++b) {
        out[b] = static_cast<uint8_t>((parted[2 * b] & 15) | parted[2 * b + 1] << 4);
        out[b + 8] = static_cast<uint8_t>(parted[2 * b] >> 4 | (parted[2 * b + 1] & 0xf0));
    }
}

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | magnitude << 13);  // infinity, NaN
    if (magnitude < 0x0400u) {                                                             // zero, subnormal
        const float x = static_cast<float>(magnitude) * 0x1p-24f;
        return sign != 0 ? -x : x;
    }
    return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

inline float load_half(const uint8_t* p) { return half_to_float(load_u16(p)); }

}  // namespace
}  // namespace moesaic
