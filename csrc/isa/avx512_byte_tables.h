// AVX-512 VBMI, BITALG and GFNI: tables of bytes in registers, for codebooks; included by avx512.h where the compiler
// may use them. Formats then may define, beside group(), mixed_group() and kQuadOrder (quantized_traits.h), with these
// words:
//
//   table_index()    64 indices: their low bytes, and where in a lane of another vector their ninth and tenth bits are
//   lookup_planes()  the two planes of 64 entries: a byte has the numbers of the levels of some weights of its entry
//   signed_quads()   four quads from a plane (8 weights an entry) or from both (4 weights), byte t of a lane from
//                    entry t, whose signs are in bits 2 to 5 of byte t
//   signs_of<b>()    8 signs from 7 bits, from bit b of each byte on: the number of minus signs is even
//   bits_from()      bytes of 8 bits from anywhere in a lane
//   select_b()       bits of the first vector where a lane of the mask has ones, of the second elsewhere
//
// Of a byte of a plane with signs in between, a lookup sees six bits, in which it disregards those that belong to other
// weights: as it is and shifted by two, the byte is the index of two weights.
#pragma once

#define MOESAIC_HAS_BYTE_TABLES

namespace moesaic {
namespace {

MOESAIC_INLINE vb select_b(uint32_t mask, vb yes, vb no) {
    return {_mm512_ternarylogic_epi32(set1_lane(mask).v, yes.v, no.v, 0xca)};
}
template <int n>
MOESAIC_INLINE vb rotate_32(vb a) {
    return {_mm512_rol_epi32(a.v, n)};
}

// Eight bits from bit a of each lane, from bit b, c and d; bits of the neighbour lane follow those of the lane, and
// precede them where a bit is negative.
template <int a, int b, int c, int d>
MOESAIC_INLINE vb bits_from(vb x) {
    constexpr uint32_t kLow = (a & 63) | (b & 63) << 8 | (c & 63) << 16 | static_cast<uint32_t>(d & 63) << 24;
    constexpr uint32_t kHigh = kLow ^ 0x20202020u;
    const __m512i offsets = _mm512_set1_epi64(static_cast<long long>(static_cast<uint64_t>(kHigh) << 32 | kLow));
    return {_mm512_multishift_epi64_epi8(offsets, x.v)};
}

template <int first>
MOESAIC_INLINE vb signs_of(vb codes) {
    constexpr uint64_t kParity = 127 << first;
    uint64_t rows = kParity;  // of a matrix of bits, the last in the lowest byte
    for (int i = 0; i < 7; ++i) rows |= uint64_t{1} << (first + i) << (8 * (7 - i));
    return {_mm512_gf2p8affine_epi64_epi8(codes.v, _mm512_set1_epi64(static_cast<long long>(rows)), 0)};
}

// Indices of 64 entries as lookups take them: bits 0 to 5, and masks of those whose bit 6, 7, 8, 9 is one.
struct TableIndex {
    __m512i low;
    __mmask64 bit_6, bit_7, bits_6_and_7, bit_8, bit_9;
};
MOESAIC_INLINE TableIndex table_index(vb low) {
    const __mmask64 bit_6 = _mm512_movepi8_mask(shl_16(low, 1).v), bit_7 = _mm512_movepi8_mask(low.v);
    return {low.v, bit_6, bit_7, _kand_mask64(bit_6, bit_7), 0, 0};
}
MOESAIC_INLINE TableIndex table_index(vb low, vb high, uint32_t ninth, uint32_t tenth = 0) {
    TableIndex index = table_index(low);
    index.bit_8 = _mm512_test_epi8_mask(high.v, set1_lane(ninth).v);
    if (tenth != 0) index.bit_9 = _mm512_test_epi8_mask(high.v, set1_lane(tenth).v);
    return index;
}

// 64 lookups in N bytes. Those that come later overwrite: fewer instructions than permutes of two tables and blends.
template <int N>
MOESAIC_INLINE __m512i lookup_bytes(const uint8_t* table, const TableIndex& index) {
    if constexpr (N > 256) {
        return _mm512_mask_blend_epi8(N == 512 ? index.bit_8 : index.bit_9, lookup_bytes<N / 2>(table, index),
                                      lookup_bytes<N / 2>(table + N / 2, index));
    }
    const auto overwrite = [&](__m512i before, __mmask64 where, const uint8_t* bytes) {
        return _mm512_mask_permutexvar_epi8(before, where, index.low, _mm512_load_si512(bytes));
    };
    __m512i out = _mm512_permutexvar_epi8(index.low, _mm512_load_si512(table));
    out = overwrite(out, index.bit_6, table + 64);
    out = overwrite(out, index.bit_7, table + 128);
    return overwrite(out, index.bits_6_and_7, table + 192);
}
template <int N>
MOESAIC_INLINE void lookup_planes(const uint8_t (&planes)[2][N], const TableIndex& index, vb (&out)[2]) {
    for (int h = 0; h < 2; ++h) out[h] = {lookup_bytes<N>(planes[h], index)};
}

MOESAIC_INLINE vb lookup64(vb index, const uint8_t (&table)[64]) {
    return {_mm512_permutexvar_epi8(index.v, _mm512_load_si512(table))};
}
template <int N>
MOESAIC_INLINE void signed_quads(const Codebook8<N>& book, vb plane, vb signs, vb* quads) {
    const vb upper = shr_16(select_b(0xf0f0f0f0, plane, signs), 2), lower = select_b(0x0f0f0f0f, plane, signs);
    for (int k = 0; k < 4; ++k) quads[k] = lookup64(k < 2 ? upper : lower, book.signed_levels[k]);
}
template <int N>
MOESAIC_INLINE void signed_quads(const Codebook4<N>& book, const vb (&planes)[2], vb signs, vb* quads) {
    const vb pairs[2] = {select_b(0x0c0c0c0c, signs, planes[0]), select_b(0x30303030, signs, planes[1])};
    for (int k = 0; k < 4; ++k) {
        quads[k] = lookup64(k % 2 == 0 ? pairs[k / 2] : shr_16(pairs[k / 2], 2), book.signed_levels[k]);
    }
}

// Byte t of quad i goes to byte i of quad t.
MOESAIC_INLINE void transpose_bytes(vb* quads) {
    for (int i = 0; i < 4; i += 2) {
        const vb a = quads[i], b = quads[i + 1];
        quads[i] = select_b(0x00ff00ff, a, shl_16(b, 8));
        quads[i + 1] = select_b(0x00ff00ff, shr_16(a, 8), b);
    }
    for (int i = 0; i < 2; ++i) {
        const vb a = quads[i], b = quads[i + 2];
        quads[i] = select_b(0x0000ffff, a, shl_32(b, 16));
        quads[i + 2] = select_b(0x0000ffff, shr_32(a, 16), b);
    }
}

// 32 bytes in another order.
MOESAIC_INLINE void permute_32(const int8_t* from, const uint8_t (&order)[32], int8_t (&to)[32]) {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order));
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutexvar_epi8(index, bytes));
    __asm__("" : "+m"(to));  // else the compiler takes them out of the register, by shuffles
}

}  // namespace
}  // namespace moesaic
