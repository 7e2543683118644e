// Weights of -1, 0, 1, five in a byte: how IQ1_S and IQ1_M can be held in memory, so that they are decoded without
// their grid of 2048 entries. Files never have blocks like these; recoding keeps scales and the sign of delta, so that
// values stay what they are, to the bit.
//
// A weight has the code weight + 2. Codes 0 to 3 of a byte are two pairs, numbers from 0 to 8 (code - 1 and three times
// the next code - 1), of which seldom one is 8; code 4 stands alone. From the highest bit on, a byte is 2 bits h, 3
// bits m, 3 bits x:
//
//   h != 0                 code 4 is h, pairs are x and x ^ m
//   h == 0, m is 1, 2, 3   code 4 is m, pairs are 8 and x ^ m
//           m is 5, 6, 7   code 4 is m - 4, pairs are x and 8
//           m is 0         both pairs are 8, code 4 is 1
//           m is 4         both pairs are 8, code 4 is 2 or, with the highest bit of x, 3
//
// So the lower six bits give two pairs, and the upper six what is to be 8 instead: codes of 3, all ones, which an OR
// makes of others. With tables of 64 bytes (lookup64()) that is two lookups for four codes.
//
// Bytes 4 v to 4 v + 3 of 52 have five quads (four weights each): vector v of a tile. Code n, for n < 4, is of group
// n or n + 4 (of 32 weights); all quads of a group that codes 0 to 3 leave over are codes 4. So a group's codes lie at
// the same bits of bytes, where they may stay: sums are 4^n times what they are, and scales make good for it.
#pragma once

#include "formats/codebooks.h"

namespace moesaic {
namespace {

constexpr int kTernaryFours = 13, kTernaryBytes = 4 * kTernaryFours;  // of 256 weights; one code 4 is of none
constexpr int kTernaryFirstFours = 7;                                 // those that have quads of groups 0 to 3

// Where quad i of group g is: vector (four bytes of a block) and code.
struct TernaryPlace {
    int four, code;
};
constexpr TernaryPlace ternary_place(int g, int i) {
    const int first = g < 4 ? 0 : kTernaryFirstFours, num = g < 4 ? 7 : 6;  // vectors whose code g % 4 is of group g
    if (i < num) return {first + i, g % 4};
    return {i == 7 ? (g < 7 ? g : 11) : g + 3, 4};
}
// The inverse: 8 g + i, or -1.
struct TernaryQuads {
    int8_t of[kTernaryFours][5];
};
constexpr TernaryQuads ternary_quads() {
    TernaryQuads quads{};
    for (auto& four : quads.of) {
        for (int8_t& quad : four) quad = -1;
    }
    for (int quad = 0; quad < 64; ++quad) {
        const TernaryPlace place = ternary_place(quad / 8, quad % 8);
        quads.of[place.four][place.code] = static_cast<int8_t>(quad);
    }
    return quads;
}
constexpr TernaryQuads kTernaryQuads = ternary_quads();

// Codes 0 to 3, two bits each from the lowest on, are pairs[lower six bits] | eights[upper six bits]; code 4 is
// fifth[0][upper six bits], 4^n times that fifth[n].
struct TernaryTables {
    alignas(64) uint8_t pairs[64], eights[64], fifth[4][64];
    alignas(64) uint8_t pair[2][16];  // the codes of one pair: the first, and in the upper four bits the second
};
constexpr TernaryTables ternary_tables() {
    TernaryTables tables{};
    for (int x = 0; x < 16; ++x) {
        tables.pair[0][x] = static_cast<uint8_t>((x % 8 % 3 + 1) | (x % 8 / 3 + 1) << 2);
        tables.pair[1][x] = static_cast<uint8_t>(tables.pair[0][x] << 4);
    }
    for (int bits = 0; bits < 64; ++bits) {
        tables.pairs[bits] = static_cast<uint8_t>(tables.pair[0][bits & 7] | tables.pair[1][(bits ^ bits >> 3) & 7]);
        const int h = bits >> 4, m = bits >> 1 & 7;
        const int code = h != 0 ? h : m % 4 != 0 ? m % 4 : m == 0 ? 1 : 2 + bits % 2;
        tables.eights[bits] = h != 0 ? 0 : m % 4 == 0 ? 0xff : m < 4 ? 0x0f : 0xf0;
        for (int n = 0; n < 4; ++n) tables.fifth[n][bits] = static_cast<uint8_t>(code << (2 * n));
    }
    return tables;
}
constexpr TernaryTables kTernaryTables = ternary_tables();

constexpr int ternary_code(uint8_t byte, int n) {
    if (n == 4) return kTernaryTables.fifth[0][byte >> 2];
    return (kTernaryTables.pairs[byte & 63] | kTernaryTables.eights[byte >> 2]) >> (2 * n) & 3;
}

// The lowest byte with five codes less 1, by the number that those are to the base 3, the first as its last digit.
struct TernaryBytes {
    uint8_t of_number[243];
};
constexpr TernaryBytes bytes_of_numbers() {
    TernaryBytes bytes{};
    for (int byte = 255; byte >= 0; --byte) {
        int number = 0;
        for (int n = 4; n >= 0; --n) number = 3 * number + ternary_code(static_cast<uint8_t>(byte), n) - 1;
        bytes.of_number[number] = static_cast<uint8_t>(byte);
    }
    return bytes;
}
constexpr TernaryBytes kTernaryBytesOf = bytes_of_numbers();

// Weight k of a block, -1, 0 or 1.
inline int ternary_weight(const uint8_t* qs, int k) {
    const TernaryPlace place = ternary_place(k / 32, k / 4 % 8);
    return ternary_code(qs[4 * place.four + k % 4], place.code) - 2;
}

// The bytes of 32 entries of the grid of IQ1, 8 weights each.
inline void ternary_bytes(const int (&indices)[32], uint8_t* qs) {
    uint8_t digits[256 + 4] = {};  // quad -1 is behind them
    for (int t = 0; t < 32; ++t) {
        const uint64_t entry = kIq1Grid.bytes[indices[t]] >> 2 & 0x0303030303030303u;  // 1, 5, 9: digits 0, 1, 2
        memcpy(digits + 8 * t, &entry, sizeof(entry));
    }
    for (int v = 0; v < kTernaryFours; ++v) {
        uint32_t numbers = 0;  // four at once, none above 242
        for (int n = 4; n >= 0; --n) {
            const int quad = kTernaryQuads.of[v][n];
            numbers = 3 * numbers + load_u32(digits + 4 * (quad < 0 ? 64 : quad));
        }
        for (int b = 0; b < 4; ++b) qs[4 * v + b] = kTernaryBytesOf.of_number[numbers >> (8 * b) & 255u];
    }
}

// 8 weights from k on.
inline void ternary_weights(float step, const uint8_t* qs, int k, float delta, float* y) {
    for (int i = 0; i < 8; ++i) y[i] = step * (static_cast<float>(ternary_weight(qs, k + i)) + delta);
}

}  // namespace
}  // namespace moesaic
