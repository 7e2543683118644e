// Any processor: the vocabulary in the compiler's own vectors. This header says what each word means.
//
//   vf  16 float lanes          vi  16 int32 lanes          vb  64 bytes = 16 lanes of 4
//
// A lane is an output row in the matrix kernels, and just an element elsewhere. Loads and stores need no alignment.
// kFullRangeBias: what dot4<true> subtracts from each weight byte before it multiplies (0 where bytes above 127 are
// as good as others); kHas32Registers: how much kernels may block.
// In the matrix kernels, up to kDirectTokens tokens share a pass over packed float weights; above, kBlockTokens tokens
// x kBlockPanels panels of sums stay in registers.
#pragma once

#include <stdint.h>

#include "isa/codebook.h"

#define MOESAIC_INLINE static inline __attribute__((always_inline))
// Before a loop whose constant trip count is best written out; here it would only bloat the code.
#define MOESAIC_UNROLL _Pragma("GCC unroll 1")

namespace moesaic {
namespace {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t generic_i32 __attribute__((vector_size(64)));
typedef uint32_t generic_u32 __attribute__((vector_size(64)));
typedef uint16_t generic_u16 __attribute__((vector_size(64)));
typedef uint8_t generic_u8 __attribute__((vector_size(64)));
struct vi {
    generic_i32 v;
};
struct vb {
    generic_u32 v;
};

constexpr bool kHas32Registers = false;
constexpr int kDirectTokens = 1, kBlockTokens = 2, kBlockPanels = 1;
constexpr int kFullRangeBias = 0;

// floats
MOESAIC_INLINE vf load(const float* p) {
    vf x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
}
MOESAIC_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof(x)); }
// the first n lanes (0 <= n <= 16), the others zero
MOESAIC_INLINE vf load_n(const float* p, int n) {
    vf x = {};
    for (int i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
MOESAIC_INLINE void store_n(float* p, vf x, int n) {
    for (int i = 0; i < n; ++i) p[i] = x[i];
}
MOESAIC_INLINE vf set1(float x) { return x - vf{}; }
MOESAIC_INLINE vf add(vf a, vf b) { return a + b; }
MOESAIC_INLINE vf sub(vf a, vf b) { return a - b; }
MOESAIC_INLINE vf mul(vf a, vf b) { return a * b; }
MOESAIC_INLINE vf div(vf a, vf b) { return a / b; }
MOESAIC_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
MOESAIC_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
MOESAIC_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
MOESAIC_INLINE vf abs(vf a) { return (vf)((generic_u32)a & 0x7fffffffu); }
MOESAIC_INLINE vf sqrt(vf a) {
    for (int i = 0; i < 16; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
// x >= 0 ? yes : no
MOESAIC_INLINE vf select_positive(vf x, vf yes, vf no) { return x >= 0.0f ? yes : no; }
MOESAIC_INLINE float reduce_add(vf a) {
    float sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += a[i];
    return sum;
}
MOESAIC_INLINE float reduce_max(vf a) {
    float largest = a[0];
    for (int i = 1; i < 16; ++i) largest = a[i] > largest ? a[i] : largest;
    return largest;
}
MOESAIC_INLINE generic_u32 widen(const uint16_t* p) {
    generic_u32 x;
    for (int i = 0; i < 16; ++i) x[i] = p[i];
    return x;
}
// 16 IEEE half floats, subnormals and infinities included
MOESAIC_INLINE vf load_f16(const uint16_t* p) {
    const generic_u32 h = widen(p);
    const generic_u32 sign = (h & 0x8000u) << 16;
    const generic_u32 magnitude = h & 0x7fffu;
    const vf normal = (vf)((magnitude << 13) + ((127u - 15u) << 23));
    const vf special = (vf)((magnitude << 13) | 0x7f800000u);
    const vf subnormal = __builtin_convertvector((generic_i32)magnitude, vf) * 0x1p-24f;
    const vf x = magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
    return (vf)((generic_u32)x | sign);
}
MOESAIC_INLINE vf load_bf16(const uint16_t* p) { return (vf)(widen(p) << 16); }
// 16 pairs of bfloat16 (even, odd)
MOESAIC_INLINE void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
    for (int i = 0; i < 16; ++i) {
        const generic_u32 pair = {p[2 * i], p[2 * i + 1]};
        const vf floats = (vf)(pair << 16);
        even[i] = floats[0];
        odd[i] = floats[1];
    }
}
// 16 x 16 floats: lane j of row i becomes lane i of row j
MOESAIC_INLINE void transpose(vf (&rows)[16]) {
    float tile[16][16];
    __builtin_memcpy(tile, rows, sizeof(tile));
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) rows[i][j] = tile[j][i];
    }
}

// int32
MOESAIC_INLINE vi zero_i() { return {generic_i32{}}; }
MOESAIC_INLINE vi set1_i(int32_t x) { return {x - generic_i32{}}; }
MOESAIC_INLINE vi load_i(const int32_t* p) {
    vi x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
}
MOESAIC_INLINE vi load_u8(const uint8_t* p) {
    vi x;
    for (int i = 0; i < 16; ++i) x.v[i] = p[i];
    return x;
}
MOESAIC_INLINE vi load_i8(const void* p) {
    vi x;
    for (int i = 0; i < 16; ++i) x.v[i] = static_cast<const int8_t*>(p)[i];
    return x;
}
MOESAIC_INLINE vi add(vi a, vi b) { return {a.v + b.v}; }
MOESAIC_INLINE vi shl(vi a, int n) { return {a.v << n}; }
MOESAIC_INLINE vf to_float(vi a) { return __builtin_convertvector(a.v, vf); }
// round to nearest, ties to even; |a| < 2^22
MOESAIC_INLINE vi to_int(vf a) {
    const vf magic = set1(12582912.0f);  // 1.5 * 2^23: the sum has the integer in its low bits
    return {(generic_i32)(a + magic) - (generic_i32)magic};
}
MOESAIC_INLINE vf as_float(vi a) { return (vf)a.v; }
MOESAIC_INLINE int32_t reduce_add(vi a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
}
MOESAIC_INLINE void store_as_i8(int8_t* p, vi a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
// (a & mask) | ones times a factor, for bits below 2^23
struct Factor {
    vf times;
};
MOESAIC_INLINE Factor factor(vf x) { return {x}; }
MOESAIC_INLINE vf times_bits(vi a, int32_t mask, const Factor& f, int32_t ones = 0) {
    return f.times * to_float(vi{(a.v & mask) | ones});
}
// byte `i` of each lane's four, zero-extended
MOESAIC_INLINE vi byte_of_lane(vb a, int i) { return {(generic_i32)((a.v >> (8 * i)) & 255u)}; }

// bytes
MOESAIC_INLINE vb load_b(const void* p) {
    vb x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
}
MOESAIC_INLINE void store_b(void* p, vb a) { __builtin_memcpy(p, &a, sizeof(a)); }
MOESAIC_INLINE vb set1_b(uint8_t x) { return {x * 0x01010101u + generic_u32{}}; }
MOESAIC_INLINE vb and_b(vb a, vb b) { return {a.v & b.v}; }
MOESAIC_INLINE vb or_b(vb a, vb b) { return {a.v | b.v}; }
MOESAIC_INLINE vb xor_b(vb a, vb b) { return {a.v ^ b.v}; }
// byte by byte: the sum modulo 256; the mean, rounded up
MOESAIC_INLINE vb add_b(vb a, vb b) { return {(generic_u32)((generic_u8)a.v + (generic_u8)b.v)}; }
MOESAIC_INLINE vb sub_b(vb a, vb b) { return {(generic_u32)((generic_u8)a.v - (generic_u8)b.v)}; }
MOESAIC_INLINE vb avg_b(vb a, vb b) { return {(a.v | b.v) - ((a.v ^ b.v) >> 1 & 0x7f7f7f7fu)}; }
MOESAIC_INLINE vb set1_lane(uint32_t x) { return {x + generic_u32{}}; }
MOESAIC_INLINE vi as_int(vb a) { return {(generic_i32)a.v}; }
// byte i of each lane, four times
template <int i>
MOESAIC_INLINE vb repeat_byte(vb a) {
    return {((a.v >> (8 * i)) & 255u) * 0x01010101u};
}
// 16 bytes, each in the four bytes of its lane; 16 half-words, each in both halves of its lane
MOESAIC_INLINE vb spread_u8(const uint8_t* p) {
    vb x;
    for (int i = 0; i < 16; ++i) x.v[i] = p[i] * 0x01010101u;
    return x;
}
MOESAIC_INLINE vb spread_u16(const uint8_t* p) {
    uint16_t halves[16];
    __builtin_memcpy(halves, p, sizeof(halves));
    vb x;
    for (int i = 0; i < 16; ++i) x.v[i] = halves[i] * 0x00010001u;
    return x;
}
// shift inside 32-bit units
MOESAIC_INLINE vb shr_32(vb a, int n) { return {a.v >> n}; }
MOESAIC_INLINE vb shl_32(vb a, int n) { return {a.v << n}; }
// shift inside 16-bit units; mask the bits that cross from the neighbour byte
MOESAIC_INLINE vb shr_16(vb a, int n) { return {(generic_u32)((generic_u16)a.v >> n)}; }
MOESAIC_INLINE vb shl_16(vb a, int n) { return {(generic_u32)((generic_u16)a.v << n)}; }
// low and high half of the product with n in 16-bit units
MOESAIC_INLINE vb mul_16(vb a, uint16_t n) { return {(generic_u32)((generic_u16)a.v * n)}; }
MOESAIC_INLINE vb mul_high_16(vb a, uint16_t n) {
    return {((a.v & 0xffffu) * n >> 16) | ((a.v >> 16) * n & 0xffff0000u)};
}
// table[index] for bytes below 16
MOESAIC_INLINE vb lookup16(vb index, const uint8_t* table) {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &index, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = table[bytes[i] & 15];
    return load_b(bytes);
}
// table[the low four bits] for bytes below 128, 0 for others
MOESAIC_INLINE vb lookup16_or_0(vb index, const uint8_t* table) {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &index, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = bytes[i] < 128 ? table[bytes[i] & 15] : 0;
    return load_b(bytes);
}
// table[the low four bits of each lane]
MOESAIC_INLINE vf lookup_floats(vb index, const float* table) {
    vf x;
    for (int i = 0; i < 16; ++i) x[i] = table[index.v[i] & 15u];
    return x;
}

// float8 (e4m3): 64 bytes [2][16 lanes][2], lane by lane those of w[0], w[1] and of w[2], w[3], as floats divided by
// kE4m3Scale; the NaN codes count as 480
constexpr float kE4m3Scale = 0x1p8f;
MOESAIC_INLINE vf widen_e4m3(generic_u32 x) {
    const generic_u32 sign = (x & 0x80u) << 24, magnitude = x & 0x7fu;
    const vf normal = (vf)((magnitude << 20) + (112u << 23));
    const vf subnormal = __builtin_convertvector((generic_i32)magnitude, vf) * 0x1p-17f;
    return (vf)((generic_u32)(magnitude < 8u ? subnormal : normal) | sign);
}
MOESAIC_INLINE void load_e4m3(const uint8_t* p, vf (&w)[4]) {
    for (int i = 0; i < 2; ++i) {
        const generic_u32 pair = widen(reinterpret_cast<const uint16_t*>(p + 32 * i));
        w[2 * i] = widen_e4m3(pair);
        w[2 * i + 1] = widen_e4m3(pair >> 8);
    }
}
// byte j of a lane becomes 128 - byte where bit first + j of byte j of signs is set
template <int first>
MOESAIC_INLINE vb mirror(vb a, vb signs) {
    uint8_t bytes[64], s[64];
    __builtin_memcpy(bytes, &a, 64);
    __builtin_memcpy(s, &signs, 64);
    for (int i = 0; i < 64; ++i) {
        if (s[i] >> (first + i % 4) & 1) bytes[i] = static_cast<uint8_t>(128 - bytes[i]);
    }
    return load_b(bytes);
}
// Entries of a codebook. Each lane has two indices below N, in its halves: quads 0 and 1 are the entry of the low one,
// quads 2 and 3 of the high one.
template <int N>
MOESAIC_INLINE void lookup8(const Codebook8<N>& book, vb index, vb (&quads)[4]) {
    for (int i = 0; i < 16; ++i) {
        const uint64_t low = book.bytes[index.v[i] & 0xffffu], high = book.bytes[index.v[i] >> 16];
        quads[0].v[i] = static_cast<uint32_t>(low);
        quads[1].v[i] = static_cast<uint32_t>(low >> 32);
        quads[2].v[i] = static_cast<uint32_t>(high);
        quads[3].v[i] = static_cast<uint32_t>(high >> 32);
    }
}
// The same for entries of 4 weights: a quad for the low index, a quad for the high one.
template <int N>
MOESAIC_INLINE void lookup4(const Codebook4<N>& book, vb index, vb (&quads)[2]) {
    for (int i = 0; i < 16; ++i) {
        quads[0].v[i] = book.bytes[index.v[i] & 0xffffu];
        quads[1].v[i] = book.bytes[index.v[i] >> 16];
    }
}

// acc + the dot product, per lane, of four unsigned weight bytes (less kFullRangeBias if kFullRange) and the four
// signed bytes at `four`. Weights stay below 128 unless kFullRange; signed bytes are in [-127, 127].
template <bool kFullRange>
MOESAIC_INLINE vi dot4(vi acc, vb weights, const int8_t* four) {
    for (int i = 0; i < 4; ++i) acc.v += (generic_i32)((weights.v >> (8 * i)) & 255u) * int32_t{four[i]};
    return acc;
}

// dot4() with activations that no other product near it takes.
template <bool kFullRange>
MOESAIC_INLINE vi dot4_once(vi acc, vb weights, const int8_t* four) {
    return dot4<kFullRange>(acc, weights, four);
}
// The sum of some products, before the next are added. Where dot4() is several instructions, this keeps the compiler
// from adding up in an order of its own, in which all products wait in memory.
MOESAIC_INLINE vi in_order(vi sum) { return sum; }

// An instruction set that needs several instructions for dot4() may define MOESAIC_HAS_NARROW_SUMS and
//   vs                  32 sums of 16 bits, two in a lane
//   narrow_dot4(w, x)   the products of dot4<false>(), two of each four in a sum
//   add(vs, vs)         in order
//   widen(vs) -> vi     the two of each lane added up
// for as many products of small weights as 16 bits hold.

// Bytes that were stored as vectors are from here on loaded from memory, not taken out of registers.
template <int N>
MOESAIC_INLINE void leave_in_memory(uint8_t (&)[N]) {}

// set1_i() of a number that has just been computed; by a load that repeats it where vector instructions are what
// counts.
MOESAIC_INLINE vi set1_through_memory(int32_t x) { return set1_i(x); }

// The same address, but the compiler does not know it: what is there is not kept from an earlier reading.
template <class T>
MOESAIC_INLINE const T* read_again(const T* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
}
MOESAIC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
// into the second-level cache only
MOESAIC_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace moesaic

#include "isa/lookups.h"
#include "isa/math.h"
