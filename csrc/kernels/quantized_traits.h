// What the products with quantised weights ask of a format; included by format_kernels.h inside an anonymous namespace.

template <class F>
constexpr bool kFullRange = F::kLargest > 127;

// Does a sum start from the zero point times the activations' sum?
template <class F>
constexpr bool kStartsFromZeroPoint = F::kZeroShift >= 0 && !(kFullRange<F> && kFullRangeBias == 1 << F::kZeroShift);

template <class F>
constexpr int kSubs = 32 / F::kScaleGroup;  // scales in a group of 32

// What an int32 sum over half `h` of a group (or all of it) starts from.
template <class F>
MOESAIC_INLINE vi initial_sum(const ActivationGroup& x, int h) {
    static_assert(!kFullRange<F> || F::kZeroShift == 7);
    if constexpr (!kStartsFromZeroPoint<F>) return zero_i();
    return shl(set1_i(kSubs<F> == 1 ? x.negated_sum : x.negated_half_sums[h]), F::kZeroShift);
}

template <class F>
MOESAIC_INLINE vf scaled_sum(const ActivationGroup& x, int h) {
    return set1(kSubs<F> == 1 ? x.scaled_sum : x.scaled_half_sums[h]);
}

// The 8 quads of group g of a tile.
template <class F>
MOESAIC_INLINE void quads_of_group(const uint8_t* tile, const typename F::Scales& scales, int g, vb (&quads)[8]) {
    if constexpr (requires { F::group(tile, scales, g, quads); }) {
        F::group(tile, scales, g, quads);
    } else {
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) quads[i] = F::quad(tile, g, i);
    }
}

// How many quads a narrow sum takes: two products of each, together less than 2^15. A power of two.
template <class F>
#ifdef MOESAIC_HAS_NARROW_SUMS
constexpr int kNarrowQuads = F::kLargest <= 15   ? 8
                             : F::kLargest <= 31 ? 4
                             : F::kLargest <= 63 ? 2
                                                 : 1;
#else
constexpr int kNarrowQuads = 1;
#endif
static_assert(8 * 2 * 15 * 128 < 1 << 15 && 4 * 2 * 31 * 128 < 1 << 15 && 2 * 2 * 63 * 128 < 1 << 15);

// Groups after which quad() repeats its instructions: those of a block unless the format says less.
template <class F>
constexpr int group_period() {
    if constexpr (requires { F::kGroupPeriod; }) return F::kGroupPeriod;
    return F::kBlock / 32;
}
