// What the products with quantised weights ask of a format; included by format_kernels.h inside an anonymous namespace.

template <class F>
constexpr bool kFullRange = F::kLargest > 127;

// Does a sum start from the zero point times the activations' sum?
template <class F>
constexpr bool kStartsFromZeroPoint = F::kZeroShift >= 0 && !(kFullRange<F> && kFullRangeBias == 1 << F::kZeroShift);

template <class F>
constexpr int kSubs = 32 / F::kScaleGroup;  // scales in a group of 32

// Scales and offsets may be without a factor of the whole block, F::block_factor(): sums over a block are multiplied by
// it.
template <class F>
constexpr bool has_block_factor() {
    if constexpr (requires { F::kHasBlockFactor; }) return F::kHasBlockFactor;
    return false;
}
// Scale and offset j with that factor.
template <class F>
MOESAIC_INLINE vf whole_scale(const typename F::Scales& scales, int j) {
    if constexpr (has_block_factor<F>()) return mul(F::block_factor(scales), F::scale(scales, j));
    return F::scale(scales, j);
}
template <class F>
MOESAIC_INLINE vf whole_offset(const typename F::Scales& scales, int j) {
    if constexpr (has_block_factor<F>()) return mul(F::block_factor(scales), F::offset(scales, j));
    return F::offset(scales, j);
}

// Direct products may take the weights of group g times 2^F::raise(g) from F::raised_quad(), which spares shifts;
// F::raised_scale() makes good for it, to the bit.
template <class F>
constexpr bool kTakesRaised = kHas32Registers && kFullRangeBias == 0 && requires { F::raise(0); };
template <class F>
constexpr int raise_of([[maybe_unused]] int g) {
    if constexpr (kTakesRaised<F>) return F::raise(g);
    return 0;
}
template <class F>
MOESAIC_INLINE vf direct_scale(const typename F::Scales& scales, int g, int h) {
    if constexpr (kTakesRaised<F>) return F::raised_scale(scales, g, h);
    return F::scale(scales, g * kSubs<F> + h);
}

// What an int32 sum over half `h` of a group (or all of it) starts from; weights are raised by so many bits.
template <class F>
MOESAIC_INLINE vi initial_sum(const ActivationGroup& x, int h, int raised = 0) {
    static_assert(!kFullRange<F> || kFullRangeBias == 0 || F::kZeroShift == 7 || F::kZeroShift == -1);
    if constexpr (!kStartsFromZeroPoint<F>) return zero_i();
    return shl(set1_i(kSubs<F> == 1 ? x.negated_sum : x.negated_half_sums[h]), F::kZeroShift + raised);
}

template <class F>
MOESAIC_INLINE vf scaled_sum(const ActivationGroup& x, int h) {
    return set1(kSubs<F> == 1 ? x.scaled_sum : x.scaled_half_sums[h]);
}

#ifdef MOESAIC_HAS_BYTE_TABLES
// Quads may come mixed: byte t of quad 4 h + i that F::mixed_group() gives is byte i of quad F::kQuadOrder[4 h + t],
// which is in half h if each half has a scale.
template <class F>
constexpr bool kMixesQuads = requires { F::kQuadOrder; };

template <class F>
MOESAIC_INLINE void sorted_group(const uint8_t* tile, const typename F::Scales& scales, int g, vb (&quads)[8]) {
    vb mixed[8];
    F::mixed_group(tile, scales, g, mixed);
    transpose_bytes(mixed);
    transpose_bytes(mixed + 4);
    MOESAIC_UNROLL
    for (int i = 0; i < 8; ++i) quads[F::kQuadOrder[i]] = mixed[i];
}

template <class F>
struct MixedOrder {
    uint8_t from[32] = {};
    constexpr MixedOrder() {
        for (int i = 0; i < 32; ++i) from[i] = static_cast<uint8_t>(4 * F::kQuadOrder[i / 16 * 4 + i % 4] + i / 4 % 4);
    }
};
template <class F>
constexpr MixedOrder<F> kMixedOrder{};

// Where the bytes of a quad are: in mixed quads 4 h to 4 h + 3, in byte t of each, as 4 h + t.
template <class F>
struct MixedPlaces {
    uint8_t of_quad[8] = {};
    constexpr MixedPlaces() {
        for (int i = 0; i < 8; ++i) of_quad[F::kQuadOrder[i]] = static_cast<uint8_t>(i);
    }
};
template <class F>
constexpr MixedPlaces<F> kMixedPlaces{};
#endif

// quad() may take scales, too, with what load_scales() has made of the tile.
template <class F>
constexpr bool kHasQuads = requires(const uint8_t* tile, const typename F::Scales& scales) {
    F::quad(tile, 0, 0);
} || requires(const uint8_t* tile, const typename F::Scales& scales) { F::quad(tile, scales, 0, 0); };
template <class F>
MOESAIC_INLINE vb quad_of(const uint8_t* tile, [[maybe_unused]] const typename F::Scales& scales, int g, int i) {
    if constexpr (requires { F::quad(tile, scales, g, i); }) {
        return F::quad(tile, scales, g, i);
    } else {
        return F::quad(tile, g, i);
    }
}

// The 8 quads of group g of a tile.
template <class F>
MOESAIC_INLINE void quads_of_group(const uint8_t* tile, const typename F::Scales& scales, int g, vb (&quads)[8]) {
#ifdef MOESAIC_HAS_BYTE_TABLES
    if constexpr (kMixesQuads<F>) return sorted_group<F>(tile, scales, g, quads);
#endif
    if constexpr (requires { F::group(tile, scales, g, quads); }) {
        F::group(tile, scales, g, quads);
    } else {
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) quads[i] = quad_of<F>(tile, scales, g, i);
    }
}

// The quads of a group as direct products take them: mixed if that is how they come.
template <class F>
MOESAIC_INLINE void direct_quads(const uint8_t* tile, const typename F::Scales& scales, int g, vb (&quads)[8]) {
#ifdef MOESAIC_HAS_BYTE_TABLES
    if constexpr (kMixesQuads<F>) return F::mixed_group(tile, scales, g, quads);
#endif
    if constexpr (kTakesRaised<F>) {
        MOESAIC_UNROLL
        for (int i = 0; i < 8; ++i) quads[i] = F::raised_quad(tile, scales, g, i);
    } else {
        quads_of_group<F>(tile, scales, g, quads);
    }
}

// The activations of a group in the order of those quads: in `out`, or where they are.
template <class F>
MOESAIC_INLINE const int8_t* direct_values(const ActivationGroup& x, [[maybe_unused]] int8_t (&out)[32]) {
#ifdef MOESAIC_HAS_BYTE_TABLES
    if constexpr (kMixesQuads<F>) {
        permute_32(x.values, kMixedOrder<F>.from, out);
        return out;
    }
#endif
    return x.values;
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
