// AVX-512 VBMI, BITALG and GFNI: tables of bytes in registers, for codebooks; included by avx512.h where the compiler
// may use them. Formats then may define, beside group(), mixed_group() and kQuadOrder (quantized_traits.h), with these
// words:
//
//   entry_numbers()  of 64 entries: their low bytes, and where in a lane of another vector their ninth and tenth bits
//   are lookup_halves()  a byte for either half of 64 entries: the numbers of the levels of its weights signed_quads()
//   four quads from a half of 8 weights or from both of 4 weights, byte t of a lane from entry t, whose
//                    signs are in bits 2 to 5 of byte t
//   signs_of_sevens() 8 signs from the low 7 bits of each byte: the number of minus signs is even
//   bits_from()      bytes of 8 bits from anywhere in a lane
//   lookup64()       a byte of a table of 64 by the low six bits of each
//   masked_or()      (a | b) & mask in one instruction
//   signed_eights()  sums of 8 activations by signs, which lookup_4() looks up
//   prefetch_here()  prefetch(), but where it is written
//   computed_here()  its argument, computed before what is written after it
//   select_b()       bits of the first vector where a lane of the mask has ones, of the second elsewhere
//
// Of the byte of a half with signs in between, a lookup sees six bits, in which it disregards those that belong to
// other weights: as it is and shifted by two, the byte is the index of two weights.
#pragma once

#define MOESAIC_HAS_BYTE_TABLES

namespace moesaic {
namespace {

MOESAIC_INLINE vb select_b(uint32_t mask, vb yes, vb no) {
    return {_mm512_ternarylogic_epi32(set1_lane(mask).v, yes.v, no.v, 0xca)};
}
// (a | b) & mask in one instruction: the compiler would share a | b between masks, and need two.
MOESAIC_INLINE vb masked_or(vb a, vb b, vb mask) { return {_mm512_ternarylogic_epi32(a.v, b.v, mask.v, 0xa8)}; }
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

MOESAIC_INLINE vb signs_of_sevens(vb codes) {
    // A matrix of bits: row i makes bit i, the last in the lowest byte, of which the last makes the parity.
    return {_mm512_gf2p8affine_epi64_epi8(codes.v, _mm512_set1_epi64(0x010204081020407f), 0)};
}

// Numbers of 64 entries: bits 0 to 7, and masks of those whose bit 6, 7, 8, 9 is one.
struct EntryNumbers {
    vb low;
    __mmask64 bit_6, bit_7, bit_8, bit_9;
};
MOESAIC_INLINE EntryNumbers entry_numbers(vb low) {
    return {low, _mm512_movepi8_mask(shl_16(low, 1).v), _mm512_movepi8_mask(low.v), 0, 0};
}
MOESAIC_INLINE EntryNumbers entry_numbers(vb low, vb high) {
    EntryNumbers numbers = entry_numbers(low);
    numbers.bit_8 = _mm512_movepi8_mask(high.v);
    return numbers;
}
MOESAIC_INLINE EntryNumbers entry_numbers(vb low, vb high, uint32_t ninth, uint32_t tenth = 0) {
    EntryNumbers numbers = entry_numbers(low);
    numbers.bit_8 = _mm512_test_epi8_mask(high.v, set1_lane(ninth).v);
    if (tenth != 0) numbers.bit_9 = _mm512_test_epi8_mask(high.v, set1_lane(tenth).v);
    return numbers;
}

// 64 lookups by the low six bits of each byte, everywhere or where the mask says.
MOESAIC_INLINE vb lookup64(vb index, const uint8_t (&table)[64]) {
    return {_mm512_permutexvar_epi8(index.v, _mm512_load_si512(table))};
}
MOESAIC_INLINE void lookup64(vb& out, __mmask64 where, vb index, const uint8_t (&table)[64]) {
    out.v = _mm512_mask_permutexvar_epi8(out.v, where, index.v, _mm512_load_si512(table));
}

// Halves of 64 entries, by tables as place_of_half() has them: a permute for each, where later ones overwrite. That is
// fewer instructions than permutes of two tables and blends.
MOESAIC_INLINE void lookup_halves(const uint8_t (&tables)[2][4][64], const EntryNumbers& n, vb (&out)[2]) {
    for (int half = 0; half < 2; ++half) {
        out[half] = lookup64(n.low, tables[half][0]);
        lookup64(out[half], n.bit_6, n.low, tables[half][1]);
        lookup64(out[half], n.bit_7, n.low, tables[half][2]);
        lookup64(out[half], _kand_mask64(n.bit_6, n.bit_7), n.low, tables[half][3]);
    }
}
// Tables 1 to 4 of a grid of 512, given those numbers whose bit 7, whose bit 8, and whose both are to be looked up.
MOESAIC_INLINE void lookup_last_tables(const uint8_t (*tables)[64], const EntryNumbers& n, vb shared, __mmask64 bit_7,
                                       __mmask64 bit_8, __mmask64 both, vb& out) {
    lookup64(out, bit_7, shared, tables[1]);
    lookup64(out, bit_8, shared, tables[2]);
    lookup64(out, both, n.low, tables[3]);
    lookup64(out, _kand_mask64(both, n.bit_6), n.low, tables[4]);
}
MOESAIC_INLINE void lookup_halves(const uint8_t (&tables)[2][5][64], const EntryNumbers& n, vb (&out)[2]) {
    const __mmask64 both = _kand_mask64(n.bit_7, n.bit_8);
    for (int half = 0; half < 2; ++half) {
        const vb shared = half == 0 ? shr_16(n.low, 1) : n.low;
        out[half] = lookup64(shared, tables[half][0]);
        lookup_last_tables(tables[half], n, shared, n.bit_7, n.bit_8, both, out[half]);
    }
}
MOESAIC_INLINE void lookup_halves(const uint8_t (&tables)[2][7][64], const EntryNumbers& n, vb (&out)[2]) {
    const __mmask64 bit_7 = _kand_mask64(n.bit_9, n.bit_7), bit_8 = _kand_mask64(n.bit_9, n.bit_8);
    const __mmask64 both = _kand_mask64(bit_7, n.bit_8);
    for (int half = 0; half < 2; ++half) {
        const vb by_fours = half == 0 ? shr_16(n.low, 2) : n.low, shared = half == 0 ? shr_16(n.low, 1) : n.low;
        out[half] = lookup64(by_fours, tables[half][0]);
        lookup64(out[half], half == 0 ? n.bit_8 : n.bit_6, by_fours, tables[half][1]);
        lookup64(out[half], n.bit_9, shared, tables[half][2]);
        lookup_last_tables(tables[half] + 2, n, shared, bit_7, bit_8, both, out[half]);
    }
}

template <int N>
MOESAIC_INLINE void signed_quads(const Codebook8<N>& book, vb half, vb signs, vb* quads) {
    const vb upper = shr_16(select_b(0xf0f0f0f0, half, signs), 2), lower = select_b(0x0f0f0f0f, half, signs);
    for (int k = 0; k < 4; ++k) quads[k] = lookup64(k < 2 ? upper : lower, book.signed_levels[k]);
}
template <int N>
MOESAIC_INLINE void signed_quads(const Codebook4<N>& book, const vb (&halves)[2], vb signs, vb* quads) {
    const vb pairs[2] = {select_b(0x0c0c0c0c, signs, halves[0]), select_b(0x30303030, signs, halves[1])};
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

// Of two times 32 values, out[h][n] for halves h of 16: the sum of its first eight and that of its last eight values,
// each times `plus`, or times `minus` where the lower (the upper) bit of n is one. Exact up to 2^24.
MOESAIC_INLINE void signed_eights(const int8_t* first, const int8_t* second, float plus, float minus,
                                  float (&out)[4][4]) {
    const __m512i one = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i x = _mm512_inserti64x4(one, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
    const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), x);
    const vf eights = to_float({_mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_CDAB))});  // a, a, b, b
    const vf others = _mm512_shuffle_ps(eights, eights, 0x4e);                                          // b, b, a, a
    const vf factors = _mm512_set4_ps(minus, minus, minus, plus), of_others = _mm512_set4_ps(minus, plus, plus, plus);
    _mm512_store_ps(out[0], fma(eights, factors, mul(others, of_others)));
    __asm__("" : "+m"(out));  // else the compiler takes them out of the register, by shuffles
}
// table[the low two bits of each lane]
MOESAIC_INLINE vf lookup_4(vb index, const float* table) {
    const __m512 all = _mm512_broadcast_f32x4(_mm_load_ps(table));
    return _mm512_permutevar_ps(all, index.v);
}

// A value that is computed where it is written. The compiler would do so only where it is needed.
MOESAIC_INLINE vf computed_here(vf x) {
    __asm__ volatile("" : "+v"(x));
    return x;
}

// A prefetch that stays where it is between instructions. The compiler would collect those of a block in one place, and
// many at once hold up what follows.
MOESAIC_INLINE void prefetch_here(const void* p) {
    __asm__ volatile("");
    prefetch(p);
}

// 64 lookups in each of two tables of 256 bytes.
MOESAIC_INLINE void lookup256(vb index, const uint8_t (&tables)[2][4][64], vb (&out)[2]) {
    lookup_halves(tables, entry_numbers(index), out);
}

}  // namespace
}  // namespace moesaic
