// Lookups of codebook entries with signs, in the words of the vocabulary; included by each isa/<name>.h at its end.
// Those with tables of bytes have other words for these (avx512_byte_tables.h).
#pragma once

namespace moesaic {
namespace {

// Bytes of 7 bits, each with the parity of its bits as the eighth.
MOESAIC_INLINE vb with_parity(vb codes) {
    vb p = xor_b(codes, shr_16(codes, 4));
    p = xor_b(p, shr_16(p, 2));
    p = xor_b(p, shr_16(p, 1));
    return or_b(codes, and_b(shl_16(p, 7), set1_b(0x80)));
}

// The low 28 bits of a lane as four bytes of 7 bits.
MOESAIC_INLINE vb spread_sevens(vb words) {
    const vb even = or_b(and_b(words, set1_lane(0x7f)), and_b(shl_32(words, 2), set1_lane(0x7f0000)));
    const vb odd = or_b(and_b(shl_32(words, 1), set1_lane(0x7f00)), and_b(shl_32(words, 3), set1_lane(0x7f000000)));
    return or_b(even, odd);
}

// The eight weights of an entry, with signs from byte t of each lane.
template <int t>
MOESAIC_INLINE void mirror_entry(vb first, vb second, vb signs, vb& first_signed, vb& second_signed) {
    const vb bits = repeat_byte<t>(signs);
    first_signed = mirror<0>(first, bits);
    second_signed = mirror<4>(second, bits);
}

// 32 weights by four indices a lane, in the halves of `even` (the first and the third) and `odd`; bit k of byte t of a
// lane of `signs`: weight k of entry t is negative.
template <int N>
MOESAIC_INLINE void lookup8_signed(const Codebook8<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    vb a[4], b[4];
    lookup8(book, even, a);
    lookup8(book, odd, b);
    mirror_entry<0>(a[0], a[1], signs, quads[0], quads[1]);
    mirror_entry<1>(b[0], b[1], signs, quads[2], quads[3]);
    mirror_entry<2>(a[2], a[3], signs, quads[4], quads[5]);
    mirror_entry<3>(b[2], b[3], signs, quads[6], quads[7]);
}

// The same for 16 weights in entries of 4: quads 4 u to 4 u + 3, their signs in bytes 2 u and 2 u + 1.
template <int u, int N>
MOESAIC_INLINE void lookup4_signed(const Codebook4<N>& book, vb even, vb odd, vb signs, vb (&quads)[8]) {
    vb a[2], b[2];
    lookup4(book, even, a);
    lookup4(book, odd, b);
    mirror_entry<2 * u>(a[0], b[0], signs, quads[4 * u], quads[4 * u + 1]);
    mirror_entry<2 * u + 1>(a[1], b[1], signs, quads[4 * u + 2], quads[4 * u + 3]);
}

}  // namespace
}  // namespace moesaic
