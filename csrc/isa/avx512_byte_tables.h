// AVX-512 VBMI and BITALG: tables of bytes in registers, for codebooks; included by avx512.h where the compiler may use
// them. An entry's levels are looked up in two planes of bytes, 64 at once; taken apart together with the signs, each
// weight's number of level and sign is then the index of the byte that kernels multiply.
#pragma once

#define MOESAIC_HAS_BYTE_TABLES

namespace moesaic {
namespace {

MOESAIC_INLINE vb count_bits(vb a) { return {_mm512_popcnt_epi8(a.v)}; }

// Eight bits from bit a of each lane, from bit b, c and d; bits of the neighbour lane follow those of the lane.
template <int a, int b, int c, int d>
MOESAIC_INLINE __m512i bit_offsets() {
    constexpr uint32_t kLow = (a & 63) | (b & 63) << 8 | (c & 63) << 16 | static_cast<uint32_t>(d & 63) << 24;
    constexpr uint32_t kHigh = kLow ^ 0x20202020u;
    return _mm512_set1_epi64(static_cast<long long>(static_cast<uint64_t>(kHigh) << 32 | kLow));
}
template <int a, int b, int c, int d>
MOESAIC_INLINE vb bits_from(vb x) {
    const __m512i offsets = bit_offsets<a, b, c, d>();
    return {_mm512_multishift_epi64_epi8(offsets, x.v)};
}

// 64 lookups in a table of N bytes, by indices whose bits from the ninth on are in `high`.
template <int N>
MOESAIC_INLINE __m512i lookup_plane(const uint8_t* table, __m512i index, __m512i high) {
    if constexpr (N == 128) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
    } else {
        __mmask64 upper;
        if constexpr (N == 256) {
            upper = _mm512_movepi8_mask(index);
        } else {
            upper = _mm512_test_epi8_mask(high, _mm512_set1_epi8(N / 512));
        }
        return _mm512_mask_blend_epi8(upper, lookup_plane<N / 2>(table, index, high),
                                      lookup_plane<N / 2>(table + N / 2, index, high));
    }
}

// Both planes of the entries that four indices a lane name: byte t of a lane for entry t.
template <int N>
MOESAIC_INLINE void lookup_planes(const uint8_t (&planes)[2][N], vb even, vb odd, __m512i (&out)[2]) {
    const __m512i low_bytes = _mm512_set1_epi16(0xff);
    const __m512i index = _mm512_ternarylogic_epi32(low_bytes, even.v, _mm512_slli_epi16(odd.v, 8), 0xca);
    const __m512i high = _mm512_ternarylogic_epi32(low_bytes, _mm512_srli_epi16(even.v, 8), odd.v, 0xca);
    for (int h = 0; h < 2; ++h) out[h] = lookup_plane<N>(planes[h], index, high);
}

// The levels of 64 weights: the low bits of `codes` and the bit of `signs` above them.
template <int num_bits>
MOESAIC_INLINE vb signed_levels(const uint8_t* levels, __m512i codes, vb signs) {
    const __m512i low_bits = _mm512_set1_epi8((1 << num_bits) - 1);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
    return {_mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(low_bits, codes, signs.v, 0xca), table)};
}

template <int t, int h, int N>
MOESAIC_INLINE vb quad_by_bytes(const Codebook8<N>& book, __m512i plane, vb signs) {
    constexpr int code = 8 * t, sign = 8 * t + 4 * h - 2;
    const vb codes = bits_from<code, code + 2, code + 4, code + 6>({plane});
    return signed_levels<2>(book.levels, codes.v, bits_from<sign, sign + 1, sign + 2, sign + 3>(signs));
}
template <int t, int N>
MOESAIC_INLINE void entry_by_bytes(const Codebook8<N>& book, const __m512i (&planes)[2], vb signs, vb (&quads)[8]) {
    quads[2 * t] = quad_by_bytes<t, 0>(book, planes[0], signs);
    quads[2 * t + 1] = quad_by_bytes<t, 1>(book, planes[1], signs);
}
template <int N>
MOESAIC_INLINE void lookup8_by_bytes(const Codebook8<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    __m512i planes[2];
    lookup_planes(book.planes, even, odd, planes);
    entry_by_bytes<0>(book, planes, signs, quads);
    entry_by_bytes<1>(book, planes, signs, quads);
    entry_by_bytes<2>(book, planes, signs, quads);
    entry_by_bytes<3>(book, planes, signs, quads);
}

template <int t, int first_sign, int N>
MOESAIC_INLINE vb quad_by_bytes(const Codebook4<N>& book, const __m512i (&planes)[2], vb signs) {
    constexpr int code = 8 * t, sign = first_sign - 3;
    const __m512i offsets = bit_offsets<code, code + 4, code, code + 4>();
    const __m512i codes = _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(offsets, planes[0]),
                                                            0xccccccccccccccccu, offsets, planes[1]);
    return signed_levels<3>(book.levels, codes, bits_from<sign, sign + 1, sign + 2, sign + 3>(signs));
}
template <int u, int N>
MOESAIC_INLINE void lookup4_by_bytes(const Codebook4<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    __m512i planes[2];
    lookup_planes(book.planes, even, odd, planes);
    quads[4 * u] = quad_by_bytes<0, 16 * u>(book, planes, signs);
    quads[4 * u + 1] = quad_by_bytes<1, 16 * u + 4>(book, planes, signs);
    quads[4 * u + 2] = quad_by_bytes<2, 16 * u + 8>(book, planes, signs);
    quads[4 * u + 3] = quad_by_bytes<3, 16 * u + 12>(book, planes, signs);
}

}  // namespace
}  // namespace moesaic
