// AVX2, FMA and F16C, and AVX-VNNI where the compiler may use it: the vocabulary in pairs of 256-bit registers. See
// generic.h for what each word means.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "isa/codebook.h"

#define MOESAIC_INLINE static inline __attribute__((always_inline))
// Before a loop whose constant trip count is best written out.
#define MOESAIC_UNROLL _Pragma("GCC unroll 8")

namespace moesaic {
namespace {

struct vf {
    __m256 a, b;
};
struct vi {
    __m256i a, b;
};
struct vb {
    __m256i a, b;
};

constexpr bool kHas32Registers = false;
constexpr int kDirectTokens = 3, kBlockTokens = 4, kBlockPanels = 1;
#ifdef __AVXVNNI__
constexpr int kFullRangeBias = 0;
#else
// maddubs would saturate on weights above 127, so those are taken as signed numbers around 128.
constexpr int kFullRangeBias = 128;
#endif

MOESAIC_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// floats
MOESAIC_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MOESAIC_INLINE vf load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
}
MOESAIC_INLINE void store(float* p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
MOESAIC_INLINE void store_n(float* p, vf x, int n) {
    _mm256_maskstore_ps(p, first_lanes(n), x.a);
    _mm256_maskstore_ps(p + 8, first_lanes(n - 8), x.b);
}
MOESAIC_INLINE vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
MOESAIC_INLINE vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MOESAIC_INLINE vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
MOESAIC_INLINE vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MOESAIC_INLINE vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
MOESAIC_INLINE vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
MOESAIC_INLINE vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MOESAIC_INLINE vf min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MOESAIC_INLINE vf sqrt(vf x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
MOESAIC_INLINE vf abs(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
MOESAIC_INLINE vf select_positive(vf x, vf yes, vf no) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, zero, _CMP_GE_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, zero, _CMP_GE_OQ))};
}
MOESAIC_INLINE float reduce_add(vf x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
MOESAIC_INLINE float reduce_max(vf x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
MOESAIC_INLINE vf load_f16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
MOESAIC_INLINE __m256 widen_bf16(const uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
MOESAIC_INLINE vf load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
MOESAIC_INLINE void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high))};
}
MOESAIC_INLINE void transpose_quarter(__m256 (&rows)[8]) {
    __m256d t[8];
    for (int i = 0; i < 8; i += 4) {  // 4 x 4 inside each 128-bit part
        const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i], rows[i + 1]));
        const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i], rows[i + 1]));
        const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i + 2], rows[i + 3]));
        const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i + 2], rows[i + 3]));
        t[i] = _mm256_unpacklo_pd(a, c);
        t[i + 1] = _mm256_unpackhi_pd(a, c);
        t[i + 2] = _mm256_unpacklo_pd(b, d);
        t[i + 3] = _mm256_unpackhi_pd(b, d);
    }
    for (int i = 0; i < 4; ++i) {
        const __m256 a = _mm256_castpd_ps(t[i]), b = _mm256_castpd_ps(t[i + 4]);
        rows[i] = _mm256_permute2f128_ps(a, b, 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
    }
}
MOESAIC_INLINE void transpose(vf (&rows)[16]) {
    __m256 quarters[2][2][8];  // [rows 0-7, 8-15][lanes 0-7, 8-15]
    for (int i = 0; i < 16; ++i) {
        quarters[i / 8][0][i % 8] = rows[i].a;
        quarters[i / 8][1][i % 8] = rows[i].b;
    }
    for (int i = 0; i < 4; ++i) transpose_quarter(quarters[i / 2][i % 2]);
    for (int i = 0; i < 16; ++i) rows[i] = {quarters[0][i / 8][i % 8], quarters[1][i / 8][i % 8]};
}

// int32
MOESAIC_INLINE vi zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
MOESAIC_INLINE vi set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
MOESAIC_INLINE vi load_i(const int32_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
MOESAIC_INLINE vi load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
MOESAIC_INLINE vi load_i8(const void* p) {
    const char* q = static_cast<const char*>(p);
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 8)))};
}
MOESAIC_INLINE vi add(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
MOESAIC_INLINE vi shl(vi x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
MOESAIC_INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
MOESAIC_INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
MOESAIC_INLINE vf as_float(vi x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
MOESAIC_INLINE int32_t reduce_add(vi x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
MOESAIC_INLINE void store_as_i8(int8_t* p, vi x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
struct Factor {
    vf times;
};
MOESAIC_INLINE Factor factor(vf x) { return {x}; }
MOESAIC_INLINE vf times_bits(vi x, int32_t mask, const Factor& f, int32_t ones = 0) {
    const __m256i bits = _mm256_set1_epi32(mask), one = _mm256_set1_epi32(ones);
    const vi masked{_mm256_and_si256(x.a, bits), _mm256_and_si256(x.b, bits)};
    return mul(f.times, to_float(vi{_mm256_or_si256(masked.a, one), _mm256_or_si256(masked.b, one)}));
}
// byte `i` of each lane's four, zero-extended
MOESAIC_INLINE vi byte_of_lane(vb x, int i) {
    const __m256i low = _mm256_set1_epi32(255);
    return {_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * i), low), _mm256_and_si256(_mm256_srli_epi32(x.b, 8 * i), low)};
}

// bytes
MOESAIC_INLINE vb load_b(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
MOESAIC_INLINE void store_b(void* p, vb x) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
}
MOESAIC_INLINE vb set1_b(uint8_t x) {
    return {_mm256_set1_epi8(static_cast<char>(x)), _mm256_set1_epi8(static_cast<char>(x))};
}
MOESAIC_INLINE vb and_b(vb x, vb y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
MOESAIC_INLINE vb or_b(vb x, vb y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
MOESAIC_INLINE vb xor_b(vb x, vb y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
MOESAIC_INLINE vb add_b(vb x, vb y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
MOESAIC_INLINE vb sub_b(vb x, vb y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
MOESAIC_INLINE vb avg_b(vb x, vb y) { return {_mm256_avg_epu8(x.a, y.a), _mm256_avg_epu8(x.b, y.b)}; }
MOESAIC_INLINE vb shr_16(vb x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
MOESAIC_INLINE vb shl_16(vb x, int n) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
MOESAIC_INLINE vb set1_lane(uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
MOESAIC_INLINE vi as_int(vb x) { return {x.a, x.b}; }
template <int i>
MOESAIC_INLINE vb repeat_byte(vb x) {
    constexpr int k = i * 0x01010101;
    const __m256i control =
        _mm256_broadcastsi128_si256(_mm_setr_epi32(k, k + 0x04040404, k + 0x08080808, k + 0x0c0c0c0c));
    return {_mm256_shuffle_epi8(x.a, control), _mm256_shuffle_epi8(x.b, control)};
}
MOESAIC_INLINE vb spread_u8(const uint8_t* p) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i first =
        _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707);
    const __m256i second = _mm256_or_si256(first, _mm256_set1_epi8(8));
    return {_mm256_shuffle_epi8(x, first), _mm256_shuffle_epi8(x, second)};
}
MOESAIC_INLINE __m256i spread_eight_u16(const uint8_t* p) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_shuffle_epi8(x, _mm256_setr_epi32(0x01000100, 0x03020302, 0x05040504, 0x07060706, 0x09080908,
                                                    0x0b0a0b0a, 0x0d0c0d0c, 0x0f0e0f0e));
}
MOESAIC_INLINE vb spread_u16(const uint8_t* p) { return {spread_eight_u16(p), spread_eight_u16(p + 16)}; }
MOESAIC_INLINE vb shr_32(vb x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
MOESAIC_INLINE vb shl_32(vb x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
MOESAIC_INLINE vb mul_16(vb x, uint16_t n) {
    const __m256i y = _mm256_set1_epi16(static_cast<int16_t>(n));
    return {_mm256_mullo_epi16(x.a, y), _mm256_mullo_epi16(x.b, y)};
}
MOESAIC_INLINE vb mul_high_16(vb x, uint16_t n) {
    const __m256i y = _mm256_set1_epi16(static_cast<int16_t>(n));
    return {_mm256_mulhi_epu16(x.a, y), _mm256_mulhi_epu16(x.b, y)};
}
MOESAIC_INLINE vb lookup16(vb index, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
MOESAIC_INLINE vb lookup16_or_0(vb index, const uint8_t* table) { return lookup16(index, table); }
MOESAIC_INLINE __m256 lookup_eight_floats(__m256i index, const float* table) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
MOESAIC_INLINE vf lookup_floats(vb index, const float* table) {
    return {lookup_eight_floats(index.a, table), lookup_eight_floats(index.b, table)};
}

// float8: a float16 with the same bits has 2^-8 of the value, subnormal or not
constexpr float kE4m3Scale = 0x1p8f;
MOESAIC_INLINE vf widen_e4m3(__m256i high_bytes) {  // in the upper byte of each 16 bits
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(high_bytes, 1), _mm256_set1_epi16(-0x4080));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
MOESAIC_INLINE void load_e4m3(const uint8_t* p, vf (&w)[4]) {
    const vb x = load_b(p);
    w[0] = widen_e4m3(_mm256_slli_epi16(x.a, 8));
    w[1] = widen_e4m3(x.a);
    w[2] = widen_e4m3(_mm256_slli_epi16(x.b, 8));
    w[3] = widen_e4m3(x.b);
}
template <int first>
MOESAIC_INLINE __m256i mirror_half(__m256i x, __m256i signs) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(0x08040201u << first));
    const __m256i mirrored = _mm256_sub_epi8(_mm256_set1_epi8(-128), x);
    return _mm256_blendv_epi8(x, mirrored, _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits));
}
template <int first>
MOESAIC_INLINE vb mirror(vb x, vb signs) {
    return {mirror_half<first>(x.a, signs.a), mirror_half<first>(x.b, signs.b)};
}
// The entries of rows 0, 1, 4, 5 of those at `indices`: an order that makes rows of quads of two of these.
template <int shift>
MOESAIC_INLINE __m256 two_and_two_entries(const uint64_t* table, const uint32_t* indices) {
    const auto entry = [&](int i) { return table + (indices[i] >> shift & 0xffffu); };
    const auto pair = [&](int i) {
        const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entry(i)));
        return _mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64*>(entry(i + 1)));
    };
    return _mm256_set_m128(pair(4), pair(0));
}
template <int shift>
MOESAIC_INLINE void eight_entries_of_8(const uint64_t* table, const uint32_t* indices, __m256i& low, __m256i& high) {
    const __m256 a = two_and_two_entries<shift>(table, indices);
    const __m256 b = two_and_two_entries<shift>(table, indices + 2);
    low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
}
template <int N>
MOESAIC_INLINE void lookup8(const Codebook8<N>& book, vb index, vb (&quads)[4]) {
    alignas(32) uint32_t indices[16];
    store_b(indices, index);
    __asm__("" : "+m"(indices));  // else the compiler takes them out of the registers, by shuffles
    eight_entries_of_8<0>(book.bytes, indices, quads[0].a, quads[1].a);
    eight_entries_of_8<0>(book.bytes, indices + 8, quads[0].b, quads[1].b);
    eight_entries_of_8<16>(book.bytes, indices, quads[2].a, quads[3].a);
    eight_entries_of_8<16>(book.bytes, indices + 8, quads[2].b, quads[3].b);
}
template <int shift>
MOESAIC_INLINE __m128i four_entries_of_4(const uint32_t* table, const uint32_t* indices) {
    const auto entry = [&](int i) { return static_cast<int>(table[indices[i] >> shift & 0xffffu]); };
    return _mm_insert_epi32(_mm_insert_epi32(_mm_insert_epi32(_mm_cvtsi32_si128(entry(0)), entry(1), 1), entry(2), 2),
                            entry(3), 3);
}
template <int shift>
MOESAIC_INLINE __m256i eight_entries_of_4(const uint32_t* table, const uint32_t* indices) {
    return _mm256_set_m128i(four_entries_of_4<shift>(table, indices + 4), four_entries_of_4<shift>(table, indices));
}
template <int N>
MOESAIC_INLINE void lookup4(const Codebook4<N>& book, vb index, vb (&quads)[2]) {
    alignas(32) uint32_t indices[16];
    store_b(indices, index);
    __asm__("" : "+m"(indices));
    quads[0] = {eight_entries_of_4<0>(book.bytes, indices), eight_entries_of_4<0>(book.bytes, indices + 8)};
    quads[1] = {eight_entries_of_4<16>(book.bytes, indices), eight_entries_of_4<16>(book.bytes, indices + 8)};
}

MOESAIC_INLINE __m256i four_in_each_lane(const int8_t* four) {
    int32_t x;
    __builtin_memcpy(&x, four, 4);
    return _mm256_set1_epi32(x);
}
template <bool kFullRange>
MOESAIC_INLINE __m256i dot4_half(__m256i acc, __m256i weights, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, weights, x);
#else
    if constexpr (kFullRange) {
        const __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        x = _mm256_sign_epi8(x, w);  // |w| * (x * sign of w): at most 2 * 128 * 127 in 16 bits
        weights = _mm256_abs_epi8(w);
    }
    const __m256i pairs = _mm256_maddubs_epi16(weights, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
template <bool kFullRange>
MOESAIC_INLINE vi dot4(vi acc, vb weights, const int8_t* four) {
    const __m256i x = four_in_each_lane(four);
    return {dot4_half<kFullRange>(acc.a, weights.a, x), dot4_half<kFullRange>(acc.b, weights.b, x)};
}
template <bool kFullRange>
MOESAIC_INLINE vi dot4_once(vi acc, vb weights, const int8_t* four) {
    return dot4<kFullRange>(acc, weights, four);
}
MOESAIC_INLINE vi in_order(vi sum) {
#ifndef __AVXVNNI__
    __asm__("" : "+x"(sum.a), "+x"(sum.b));
#endif
    return sum;
}
#ifndef __AVXVNNI__
// Three instructions a dot product are two as long as sums of pairs stay below 2^15.
#define MOESAIC_HAS_NARROW_SUMS
struct vs {
    __m256i a, b;
};
MOESAIC_INLINE vs narrow_dot4(vb weights, const int8_t* four) {
    const __m256i x = four_in_each_lane(four);
    return {_mm256_maddubs_epi16(weights.a, x), _mm256_maddubs_epi16(weights.b, x)};
}
MOESAIC_INLINE vs add(vs x, vs y) {
    const vi sum = in_order({_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)});
    return {sum.a, sum.b};
}
MOESAIC_INLINE vi widen(vs x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(x.a, ones), _mm256_madd_epi16(x.b, ones)};
}
#endif

MOESAIC_INLINE vi set1_through_memory(int32_t x) { return set1_i(x); }
template <int N>
MOESAIC_INLINE void leave_in_memory(uint8_t (&bytes)[N]) {
    __asm__("" : "+m"(bytes));
}
template <class T>
MOESAIC_INLINE const T* read_again(const T* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}
MOESAIC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
MOESAIC_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace moesaic

#include "isa/lookups.h"
#include "isa/math.h"
