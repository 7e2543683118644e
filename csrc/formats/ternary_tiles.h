// The bytes of ternary.h as kernels take them: all codes of a tile in memory, or, where lookups of bytes are quick, its
// sums with one token's activations.
#pragma once

#include <utility>

#include "formats/ternary.h"

#ifdef MOESAIC_ISA

namespace moesaic {
namespace {

// Codes of group g lie 2^n times too high in bytes, where direct products take them so (raised_quad()).
constexpr int ternary_raise(int g) { return kHas32Registers && kFullRangeBias == 0 ? 2 * (g % 4) : 0; }

// The group of which vector v has codes 4.
constexpr int group_of_fifth(int v) { return kTernaryQuads.of[v][4] < 0 ? 0 : kTernaryQuads.of[v][4] / 8; }

// Of each vector of a tile, codes 0 to 3, two bits each, and codes 4, raised as their group's others.
struct TernaryCodes {
    alignas(64) uint8_t first[64 * kTernaryFours], fifth[64 * kTernaryFours];
};

#ifdef MOESAIC_HAS_BYTE_TABLES
MOESAIC_INLINE void take_codes(vb bytes, int raise, vb& first, vb& fifth) {
    const vb upper = shr_16(bytes, 2);
    first = or_b(lookup64(bytes, kTernaryTables.pairs), lookup64(upper, kTernaryTables.eights));
    fifth = lookup64(upper, kTernaryTables.fifth[raise / 2]);
}
#else
MOESAIC_INLINE void take_codes(vb bytes, int raise, vb& first, vb& fifth) {
    const vb seven = set1_b(7), x = and_b(bytes, seven), x_xor_m = and_b(xor_b(bytes, shr_16(bytes, 3)), seven);
    const vb pairs = or_b(lookup16(x, kTernaryTables.pair[0]), lookup16(x_xor_m, kTernaryTables.pair[1]));
    // A quarter of the byte and 112: from 128 on if h is not 0.
    const vb quarter = avg_b(avg_b(bytes, set1_b(127)), set1_b(159));
    first = or_b(pairs, lookup16_or_0(quarter, kTernaryTables.eights));
    const vb h = and_b(shr_16(bytes, 6 - raise), set1_b(static_cast<uint8_t>(3 << raise)));
    fifth = or_b(h, lookup16_or_0(quarter, kTernaryTables.fifth[raise / 2]));
}
#endif

MOESAIC_INLINE void take_codes(const uint8_t* tile_qs, TernaryCodes& codes) {
    MOESAIC_UNROLL
    for (int v = 0; v < kTernaryFours; ++v) {
        vb first, fifth;
        take_codes(load_b(tile_qs + 64 * v), ternary_raise(group_of_fifth(v)), first, fifth);
        store_b(codes.first + 64 * v, first);
        store_b(codes.fifth + 64 * v, fifth);
    }
    leave_in_memory(codes.first);
    leave_in_memory(codes.fifth);
}

// Quad i of group g: codes from 1 to 3, times 2^up.
template <int up = 0>
MOESAIC_INLINE vb ternary_quad(const TernaryCodes& codes, int g, int i) {
    const TernaryPlace place = ternary_place(g, i);
    const int by = up - (place.code == 4 ? ternary_raise(g) : 2 * place.code);
    const vb bytes = load_b((place.code == 4 ? codes.fifth : codes.first) + 64 * place.four);
    const vb moved = by > 0 ? shl_16(bytes, by) : by < 0 ? shr_16(bytes, -by) : bytes;
    return place.code == 4 ? moved : and_b(moved, set1_b(3 << up));
}
// The same as direct products take it, where the bits are.
MOESAIC_INLINE vb raised_ternary_quad(const TernaryCodes& codes, int g, int i) {
    const TernaryPlace place = ternary_place(g, i);
    if (place.code == 4) return load_b(codes.fifth + 64 * place.four);
    return and_b(load_b(codes.first + 64 * place.four), set1_b(static_cast<uint8_t>(3 << ternary_raise(g))));
}

#ifdef MOESAIC_HAS_BYTE_TABLES
// sums[g kHalves + h] += raised codes n of vector v times the activations of group g (and half h) of which they are.
template <int kHalves, int v, int n, class Group>
MOESAIC_INLINE void add_codes(vb pairs, vb eights, vb upper, const Group* x, vi (&sums)[8 * kHalves]) {
    constexpr int kQuad = kTernaryQuads.of[v][n], kGroup = kQuad / 8, kInGroup = kQuad % 8;
    if constexpr (kQuad >= 0) {
        constexpr int kRaise = ternary_raise(kGroup);
        vi& sum = sums[kGroup * kHalves + kInGroup * kHalves / 8];
        vb codes;
        if constexpr (n < 4) {
            codes = masked_or(pairs, eights, set1_b(static_cast<uint8_t>(3 << kRaise)));
        } else {
            codes = lookup64(upper, kTernaryTables.fifth[kRaise / 2]);
        }
        sum = dot4_once<true>(sum, codes, x[kGroup].values + 4 * kInGroup);
    }
}
template <int kHalves, int v, int... n, class Group>
MOESAIC_INLINE void add_vector(const uint8_t* tile_qs, std::integer_sequence<int, n...>, const Group* x,
                               vi (&sums)[8 * kHalves]) {
    const vb bytes = load_b(tile_qs + 64 * v), upper = shr_16(bytes, 2);
    const vb pairs = lookup64(bytes, kTernaryTables.pairs), eights = lookup64(upper, kTernaryTables.eights);
    (add_codes<kHalves, v, n>(pairs, eights, upper, x, sums), ...);
}
template <int kHalves, int kFirst, int... v, class Group>
MOESAIC_INLINE void add_vectors(const uint8_t* tile_qs, const uint8_t* ahead, std::integer_sequence<int, v...>,
                                const Group* x, vi (&sums)[8 * kHalves]) {
    const auto one = [&]<int w>(std::integral_constant<int, w>) {
        prefetch_here(ahead + 64 * w);
        add_vector<kHalves, w>(tile_qs, std::make_integer_sequence<int, 5>(), x, sums);
    };
    (one(std::integral_constant<int, kFirst + v>()), ...);
}

// A tile's raised codes times the activations of 8 groups x of one token, in sums of a group or of half a group. They
// all fit the registers, so each vector is taken apart once. What is at `ahead` is prefetched. First those vectors
// after which groups 0 to 3 are complete, then the others: scales of the former need not wait for the latter.
template <int kHalves, class Group>
MOESAIC_INLINE void first_ternary_sums(const uint8_t* tile_qs, const uint8_t* ahead, const Group* x,
                                       vi (&sums)[8 * kHalves]) {
    MOESAIC_UNROLL
    for (int s = 0; s < 8 * kHalves; ++s) sums[s] = zero_i();
    add_vectors<kHalves, 0>(tile_qs, ahead, std::make_integer_sequence<int, kTernaryFirstFours>(), x, sums);
}
template <int kHalves, class Group>
MOESAIC_INLINE void other_ternary_sums(const uint8_t* tile_qs, const uint8_t* ahead, const Group* x,
                                       vi (&sums)[8 * kHalves]) {
    constexpr int kOthers = kTernaryFours - kTernaryFirstFours;
    add_vectors<kHalves, kTernaryFirstFours>(tile_qs, ahead, std::make_integer_sequence<int, kOthers>(), x, sums);
}
#endif

}  // namespace
}  // namespace moesaic

#endif
