// AVX-512 (F, BW, DQ, VL, VNNI): the vocabulary in whole registers. See generic.h for what each word means.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "isa/codebook.h"

#define MOESAIC_INLINE static inline __attribute__((always_inline))
// Before a loop whose constant trip count is best written out.
#define MOESAIC_UNROLL _Pragma("GCC unroll 8")

namespace moesaic {
namespace {

using vf = __m512;
struct vi {
    __m512i v;
};
struct vb {
    __m512i v;
};

constexpr bool kHas32Registers = true;
constexpr int kDirectTokens = 6, kBlockTokens = 6, kBlockPanels = 2;
constexpr int kFullRangeBias = 0;

MOESAIC_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

// floats
MOESAIC_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
MOESAIC_INLINE vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
MOESAIC_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
MOESAIC_INLINE void store_n(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
MOESAIC_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
MOESAIC_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
MOESAIC_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
MOESAIC_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MOESAIC_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
MOESAIC_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MOESAIC_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
MOESAIC_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
MOESAIC_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
MOESAIC_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
MOESAIC_INLINE vf select_positive(vf x, vf yes, vf no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), no, yes);
}
MOESAIC_INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps(a); }
MOESAIC_INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps(a); }
MOESAIC_INLINE vf load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MOESAIC_INLINE vf load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
MOESAIC_INLINE void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    const __m512i x = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
MOESAIC_INLINE void transpose(vf (&rows)[16]) {
    __m512d t[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 inside each 128-bit part
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
        t[i] = _mm512_unpacklo_pd(a, c);
        t[i + 1] = _mm512_unpackhi_pd(a, c);
        t[i + 2] = _mm512_unpacklo_pd(b, d);
        t[i + 3] = _mm512_unpackhi_pd(b, d);
    }
    for (int i = 0; i < 4; ++i) {  // 4 x 4 of those parts
        const vf a = _mm512_castpd_ps(t[i]), b = _mm512_castpd_ps(t[i + 4]);
        const vf c = _mm512_castpd_ps(t[i + 8]), d = _mm512_castpd_ps(t[i + 12]);
        const vf ab_even = _mm512_shuffle_f32x4(a, b, 0x88), ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
        const vf cd_even = _mm512_shuffle_f32x4(c, d, 0x88), cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
        rows[i] = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
        rows[i + 12] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
    }
}

// int32
MOESAIC_INLINE vi zero_i() { return {_mm512_setzero_si512()}; }
MOESAIC_INLINE vi set1_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
MOESAIC_INLINE vi load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
MOESAIC_INLINE vi load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
MOESAIC_INLINE vi load_i8(const void* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
MOESAIC_INLINE vi add(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
MOESAIC_INLINE vi shl(vi a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
MOESAIC_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a.v); }
MOESAIC_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a)}; }
MOESAIC_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a.v); }
MOESAIC_INLINE int32_t reduce_add(vi a) { return _mm512_reduce_add_epi32(a.v); }
MOESAIC_INLINE void store_as_i8(int8_t* p, vi a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
struct Factor {
    vf times, less;
};
MOESAIC_INLINE Factor factor(vf x) { return {x, mul(x, set1(-0x1p23f))}; }
MOESAIC_INLINE vf times_bits(vi a, int32_t mask, const Factor& f, int32_t ones = 0) {
    // As the end of a mantissa the bits are 2^23 more: (a & mask) | exponent.
    const __m512i end = _mm512_set1_epi32(0x4b000000 | ones);
    const __m512i bits = _mm512_ternarylogic_epi32(a.v, _mm512_set1_epi32(mask), end, 0xea);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(bits), f.times, f.less);
}
// byte `i` of each lane's four, zero-extended
MOESAIC_INLINE vi byte_of_lane(vb a, int i) {
    return {_mm512_and_si512(_mm512_srli_epi32(a.v, static_cast<unsigned>(8 * i)), _mm512_set1_epi32(255))};
}

// bytes
MOESAIC_INLINE vb load_b(const void* p) { return {_mm512_loadu_si512(p)}; }
MOESAIC_INLINE void store_b(void* p, vb a) { _mm512_storeu_si512(p, a.v); }
MOESAIC_INLINE vb set1_b(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
MOESAIC_INLINE vb and_b(vb a, vb b) { return {_mm512_and_si512(a.v, b.v)}; }
MOESAIC_INLINE vb or_b(vb a, vb b) { return {_mm512_or_si512(a.v, b.v)}; }
MOESAIC_INLINE vb xor_b(vb a, vb b) { return {_mm512_xor_si512(a.v, b.v)}; }
MOESAIC_INLINE vb add_b(vb a, vb b) { return {_mm512_add_epi8(a.v, b.v)}; }
MOESAIC_INLINE vb sub_b(vb a, vb b) { return {_mm512_sub_epi8(a.v, b.v)}; }
MOESAIC_INLINE vb avg_b(vb a, vb b) { return {_mm512_avg_epu8(a.v, b.v)}; }
MOESAIC_INLINE vb shr_16(vb a, int n) { return {_mm512_srli_epi16(a.v, static_cast<unsigned>(n))}; }
MOESAIC_INLINE vb shl_16(vb a, int n) { return {_mm512_slli_epi16(a.v, static_cast<unsigned>(n))}; }
MOESAIC_INLINE vb set1_lane(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
MOESAIC_INLINE vi as_int(vb a) { return {a.v}; }
template <int i>
MOESAIC_INLINE vb repeat_byte(vb a) {
    constexpr int k = i * 0x01010101;
    const __m512i control = _mm512_set4_epi32(k + 0x0c0c0c0c, k + 0x08080808, k + 0x04040404, k);
    return {_mm512_shuffle_epi8(a.v, control)};
}
MOESAIC_INLINE vb spread_u8(const uint8_t* p) {
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i four = _mm512_set4_epi32(0x03030303, 0x02020202, 0x01010101, 0);
    const __m512i part =
        _mm512_setr_epi32(0, 0, 0, 0, 0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x08080808, 0x08080808,
                          0x08080808, 0x08080808, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c);
    return {_mm512_shuffle_epi8(x, _mm512_or_si512(part, four))};
}
MOESAIC_INLINE vb spread_u16(const uint8_t* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_or_si512(x, _mm512_slli_epi32(x, 16))};
}
MOESAIC_INLINE vb shr_32(vb a, int n) { return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))}; }
MOESAIC_INLINE vb shl_32(vb a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
MOESAIC_INLINE vb mul_16(vb a, uint16_t n) {
    return {_mm512_mullo_epi16(a.v, _mm512_set1_epi16(static_cast<int16_t>(n)))};
}
MOESAIC_INLINE vb mul_high_16(vb a, uint16_t n) {
    return {_mm512_mulhi_epu16(a.v, _mm512_set1_epi16(static_cast<int16_t>(n)))};
}
MOESAIC_INLINE vb lookup16(vb index, const uint8_t* table) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), index.v)};
}
MOESAIC_INLINE vb lookup16_or_0(vb index, const uint8_t* table) { return lookup16(index, table); }
MOESAIC_INLINE vf lookup_floats(vb index, const float* table) {
    return _mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table));
}

// float8: a float16 with the same bits has 2^-8 of the value, subnormal or not
constexpr float kE4m3Scale = 0x1p8f;
MOESAIC_INLINE void widen_e4m3(__m512i high_bytes, vf& first, vf& second) {  // in the upper byte of each 16 bits
    const __m512i half = _mm512_and_si512(_mm512_srai_epi16(high_bytes, 1), _mm512_set1_epi16(-0x4080));
    first = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
MOESAIC_INLINE void load_e4m3(const uint8_t* p, vf (&w)[4]) {
    const __m512i x = _mm512_loadu_si512(p);
    widen_e4m3(_mm512_slli_epi16(x, 8), w[0], w[2]);
    widen_e4m3(x, w[1], w[3]);
}
template <int first>
MOESAIC_INLINE vb mirror(vb a, vb signs) {
    const __m512i bits = _mm512_set1_epi32(static_cast<int>(0x08040201u << first));
    return {_mm512_mask_sub_epi8(a.v, _mm512_test_epi8_mask(signs.v, bits), _mm512_set1_epi8(-128), a.v)};
}
// 32 lookups in a table of N half-words, all of it read: the fastest way up to 512.
template <int N>
MOESAIC_INLINE __m512i lookup_codes(const uint16_t* table, __m512i index) {
    if constexpr (N == 64) {
        return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 32));
    } else {
        const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(N / 2));
        return _mm512_mask_blend_epi16(upper, lookup_codes<N / 2>(table, index),
                                       lookup_codes<N / 2>(table + N / 2, index));
    }
}
// Entries of 8 weights for the low and the high index of each row. Their two halves, from rows 0-7 and 8-15:
MOESAIC_INLINE void split_entries(__m512i upper_rows, __m512i lower_rows, vb& first, vb& second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    first = {_mm512_permutex2var_epi32(upper_rows, even, lower_rows)};
    second = {_mm512_permutex2var_epi32(upper_rows, _mm512_or_si512(even, _mm512_set1_epi32(1)), lower_rows)};
}
#ifdef MOESAIC_HAS_FAST_GATHERS
MOESAIC_INLINE void load_entries(const uint64_t* table, vb index, vb (&quads)[4]) {
    const auto rows = [&](__m512i indices, vb& first, vb& second) {
        split_entries(_mm512_i32gather_epi64(_mm512_castsi512_si256(indices), table, 8),
                      _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(indices, 1), table, 8), first, second);
    };
    rows(_mm512_and_si512(index.v, _mm512_set1_epi32(0xffff)), quads[0], quads[1]);
    rows(_mm512_srli_epi32(index.v, 16), quads[2], quads[3]);
}
#else
// By single loads, four rows at a time.
MOESAIC_INLINE void four_entries(const uint64_t* table, const uint32_t* indices, __m256i& low, __m256i& high) {
    const auto entry = [&](uint32_t i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + i)); };
    low = _mm256_broadcastq_epi64(entry(indices[0] & 0xffffu));
    high = _mm256_broadcastq_epi64(entry(indices[0] >> 16));
    low = _mm256_mask_broadcastq_epi64(low, 2, entry(indices[1] & 0xffffu));
    high = _mm256_mask_broadcastq_epi64(high, 2, entry(indices[1] >> 16));
    low = _mm256_mask_broadcastq_epi64(low, 4, entry(indices[2] & 0xffffu));
    high = _mm256_mask_broadcastq_epi64(high, 4, entry(indices[2] >> 16));
    low = _mm256_mask_broadcastq_epi64(low, 8, entry(indices[3] & 0xffffu));
    high = _mm256_mask_broadcastq_epi64(high, 8, entry(indices[3] >> 16));
}
MOESAIC_INLINE void load_entries(const uint64_t* table, vb index, vb (&quads)[4]) {
    alignas(64) uint32_t indices[16];
    store_b(indices, index);
    __asm__("" : "+m"(indices));  // else the compiler takes them out of the register, by shuffles
    __m256i low[4], high[4];
    for (int i = 0; i < 4; ++i) four_entries(table, indices + 4 * i, low[i], high[i]);
    const auto join = [](const __m256i& a, const __m256i& b) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    };
    split_entries(join(low[0], low[1]), join(low[2], low[3]), quads[0], quads[1]);
    split_entries(join(high[0], high[1]), join(high[2], high[3]), quads[2], quads[3]);
}
#endif
template <int N>
MOESAIC_INLINE void lookup8(const Codebook8<N>& book, vb index, vb (&quads)[4]) {
    if constexpr (N > 512) {
        load_entries(book.bytes, index, quads);
    } else {
        const __m512i codes = lookup_codes<N>(book.codes, index.v);
        // Each half twice; then weights 0, 1 and 2, 3 or 4, 5 and 6, 7 are a shift away.
        const __m512i low =
            _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100));
        const __m512i high =
            _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302));
        const __m512i first = _mm512_set1_epi32(2 << 16), second = _mm512_set1_epi32(6 << 16 | 4);
        const __m512i two_bits = _mm512_set1_epi8(3);
        const auto levels = [&](__m512i x, __m512i shifts) {
            return lookup16({_mm512_and_si512(_mm512_srlv_epi16(x, shifts), two_bits)}, book.levels);
        };
        quads[0] = levels(low, first);
        quads[1] = levels(low, second);
        quads[2] = levels(high, first);
        quads[3] = levels(high, second);
    }
}
template <int N>
MOESAIC_INLINE void lookup4(const Codebook4<N>& book, vb index, vb (&quads)[2]) {
    const __m512i codes = lookup_codes<N>(book.codes, index.v);
    const __m512i low_half = _mm512_set1_epi32(0xffff), four_bits = _mm512_set1_epi8(15);
    const auto levels = [&](__m512i low, __m512i high) {                            // two of a quad's nibbles in each
        const __m512i both = _mm512_ternarylogic_epi32(low_half, low, high, 0xca);  // low_half ? low : high
        return lookup16({_mm512_and_si512(both, four_bits)}, book.levels);
    };
    quads[0] = levels(codes, _mm512_slli_epi32(codes, 12));
    quads[1] = levels(_mm512_srli_epi32(codes, 16), _mm512_srli_epi32(codes, 4));
}

template <bool kFullRange>
MOESAIC_INLINE vi dot4(vi acc, vb weights, const int8_t* four) {
    int32_t x;
    __builtin_memcpy(&x, four, 4);
    return {_mm512_dpbusd_epi32(acc.v, weights.v, _mm512_set1_epi32(x))};
}
// The compiler (GCC 12) would repeat the four by an instruction of its own.
template <bool kFullRange>
MOESAIC_INLINE vi dot4_once(vi acc, vb weights, const int8_t* four) {
    using Four __attribute__((may_alias, aligned(1))) = int32_t;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(weights.v), "m"(*reinterpret_cast<const Four*>(four)));
    return acc;
}
MOESAIC_INLINE vi in_order(vi sum) { return sum; }

// Else the compiler takes parts out of the register that was stored, by shuffles.
template <int N>
MOESAIC_INLINE void leave_in_memory(uint8_t (&bytes)[N]) {
    __asm__("" : "+m"(bytes));
}
MOESAIC_INLINE vi set1_through_memory(int32_t x) {
    __m512i repeated;
    __asm__("vpbroadcastd %1, %0" : "=v"(repeated) : "m"(x));
    return {repeated};
}
template <class T>
MOESAIC_INLINE const T* read_again(const T* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}
// Into the second-level cache too: 16 cores read 7% faster than where prefetches wait for the first level.
MOESAIC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
MOESAIC_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace moesaic

#if defined(__AVX512VBMI__) && defined(__AVX512BITALG__) && defined(__GFNI__)
#include "isa/avx512_byte_tables.h"
#endif
#include "isa/lookups.h"
#include "isa/math.h"
