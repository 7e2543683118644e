// Few tokens times quantised weights, straight from the packed bytes; included by format_kernels.h inside an anonymous
// namespace.

// Sums that start from the bits of 1.5 x 2^23 need no conversion: as floats they are that much larger, for sums below
// 2^22. The product with a scale of up to 22 bits, less that of the bias, is then what it would be without, unless it
// is infinite.
template <class F>
constexpr bool has_wide_scales() {
    if constexpr (requires { F::kHasWideScales; }) return F::kHasWideScales;
    return false;
}
template <class F, int T>
constexpr bool kBiasedSums = kHas32Registers && T > 1 && !has_wide_scales<F>();
constexpr float kSumBias = 0x1.8p23f;
constexpr int32_t kSumBiasBits = 0x4b400000;
static_assert(8 * 4 * 255 * 127 < 1 << 22);

// What such a sum over half `h` of a group (or all of it) starts from: the bias and the zero point, by scalar
// instructions and a load that repeats the number, of which there are some to spare.
template <class F>
MOESAIC_INLINE vi biased_start(const ActivationGroup& x, int h, int raised) {
    if constexpr (kStartsFromZeroPoint<F>) {
        const int32_t negated_sum = kSubs<F> == 1 ? x.negated_sum : x.negated_half_sums[h];
        return set1_through_memory(kSumBiasBits + negated_sum * (1 << (F::kZeroShift + raised)));
    } else {
        return set1_i(kSumBiasBits);
    }
}

// What sums of T tokens start from, with that bias or without.
template <class F, int T>
MOESAIC_INLINE vi first_sum(const ActivationGroup& x, int h, int raised = 0) {
    if constexpr (kBiasedSums<F, T>) return biased_start<F>(x, h, raised);
    return initial_sum<F>(x, h, raised);
}

// Such a sum times its scale; bias: -kSumBias times the scale.
template <class F, int T>
MOESAIC_INLINE vf scaled_dots(vi dots, vf scale, vf bias) {
    if constexpr (kBiasedSums<F, T>) return fma(as_float(dots), scale, bias);
    return mul(to_float(dots), scale);
}

// Up to how many tokens dot4_once() is faster than dot4(): fewer instructions, but none between load and product.
constexpr int kMostAtOnce = 3;

// dots[t] = half `h` of group g of weights (or all of it) times a group of T tokens, whose values come in the order of
// the quads, plus the zero point.
template <class F, int T>
MOESAIC_INLINE void direct_dots(const vb (&quads)[8], int g, int h, const ActivationGroup* const (&tokens)[T],
                                const int8_t* const (&values)[T], vi (&dots)[T]) {
    constexpr int kQuads = 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) dots[t] = first_sum<F, T>(*tokens[t], h, raise_of<F>(g));
    MOESAIC_UNROLL
    for (int i = kQuads * h; i < kQuads * (h + 1); ++i) {
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const int8_t* four = values[t] + 4 * i;
            if constexpr (T <= kMostAtOnce) {
                dots[t] = dot4_once<kFullRange<F>>(dots[t], quads[i], four);
            } else {
                dots[t] = dot4<kFullRange<F>>(dots[t], quads[i], four);
            }
        }
    }
}

// sums[t] += half `h` of group g of a tile times a group of T tokens, whose dots are there.
template <class F, int T>
MOESAIC_INLINE void add_scaled(const vi (&dots)[T], const typename F::Scales& scales, int g, int h,
                               const ActivationGroup* const (&tokens)[T], vf (&sums)[T]) {
    const int sub = g * kSubs<F> + h;
    const vf scale = direct_scale<F>(scales, g, h), bias = mul(scale, set1(-kSumBias));
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) {
        sums[t] = fma(scaled_dots<F, T>(dots[t], scale, bias), set1(tokens[t]->scale), sums[t]);
    }
    if constexpr (F::kHasOffset) {
        const vf offset = F::offset(scales, sub);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) sums[t] = fma(offset, scaled_sum<F>(*tokens[t], h), sums[t]);
    }
}

#ifdef MOESAIC_HAS_NARROW_SUMS
// dots[t] = half `h` of group g (or all of it) of a tile times T tokens, plus the zero point, quad by quad: there are
// too few registers for a whole group.
template <class F, int T>
MOESAIC_INLINE void dots_by_quads(const uint8_t* tile, const typename F::Scales& scales, int g, int h,
                                  const ActivationGroup* const (&tokens)[T], vi (&dots)[T]) {
    constexpr int kQuads = 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) dots[t] = initial_sum<F>(*tokens[t], h);
    MOESAIC_UNROLL
    for (int i = kQuads * h; i < kQuads * (h + 1); ++i) {
        const vb quad = quad_of<F>(tile, scales, g, i);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            dots[t] = in_order(dot4<kFullRange<F>>(dots[t], quad, tokens[t]->values + 4 * i));
        }
    }
}

// The same by narrow sums.
template <class F, int T>
MOESAIC_INLINE void narrow_dots(const uint8_t* tile, const typename F::Scales& scales, int g, int h,
                                const ActivationGroup* const (&tokens)[T], vi (&dots)[T]) {
    constexpr int kQuads = 8 / kSubs<F>, kChain = kNarrowQuads<F> < kQuads ? kNarrowQuads<F> : kQuads;
    MOESAIC_UNROLL
    for (int first = kQuads * h; first < kQuads * (h + 1); first += kChain) {
        vs sums[T];
        MOESAIC_UNROLL
        for (int i = first; i < first + kChain; ++i) {
            const vb quad = quad_of<F>(tile, scales, g, i);
            MOESAIC_UNROLL
            for (int t = 0; t < T; ++t) {
                const vs products = narrow_dot4(quad, tokens[t]->values + 4 * i);
                sums[t] = i == first ? products : add(sums[t], products);
            }
        }
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const vi before = first == kQuads * h ? initial_sum<F>(*tokens[t], h) : dots[t];
            dots[t] = add(before, widen(sums[t]));
        }
    }
}

template <class F, int T>
MOESAIC_INLINE void add_narrow_group(const uint8_t* tile, const typename F::Scales& scales, int g,
                                     const ActivationGroup* const (&tokens)[T], vf (&sums)[T]) {
    tile = read_again(tile);  // else what two groups have in common stays in registers, of which there are too few
    MOESAIC_UNROLL
    for (int h = 0; h < kSubs<F>; ++h) {
        vi dots[T];
        if constexpr (kNarrowQuads<F> > 1) {
            narrow_dots<F, T>(tile, scales, g, h, tokens, dots);
        } else {
            dots_by_quads<F, T>(tile, scales, g, h, tokens, dots);
        }
        add_scaled<F, T>(dots, scales, g, h, tokens, sums);
    }
}
#endif

// sums[t] += group g of a tile times a group of T tokens.
template <class F, int T>
MOESAIC_INLINE void add_group(const uint8_t* tile, const typename F::Scales& scales, int g,
                              const ActivationGroup* const (&tokens)[T], vf (&sums)[T]) {
#ifdef MOESAIC_HAS_NARROW_SUMS
    if constexpr (kHasQuads<F> && (T > 1 || kNarrowQuads<F> > 1)) {
        return add_narrow_group<F, T>(tile, scales, g, tokens, sums);
    }
#endif
    vb quads[8];
    direct_quads<F>(tile, scales, g, quads);
    int8_t in_order[T][32];
    const int8_t* values[T];
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) values[t] = direct_values<F>(*tokens[t], in_order[t]);
    MOESAIC_UNROLL
    for (int h = 0; h < kSubs<F>; ++h) {
        vi dots[T];
        direct_dots<F, T>(quads, g, h, tokens, values, dots);
        add_scaled<F, T>(dots, scales, g, h, tokens, sums);
    }
}

// sums[t] += a tile times T tokens, from where on they are; they go on to the next block. What is at `ahead` is
// prefetched.
template <class F, int T>
MOESAIC_INLINE void add_groups(const uint8_t* tile, const uint8_t* ahead, const typename F::Scales& scales,
                               const ActivationGroup* (&tokens)[T], vf (&sums)[T]) {
    constexpr int kGroups = F::kBlock / 32, kGroupBytes = 16 * F::kBlockBytes / kGroups, kPeriod = group_period<F>();
    // Else the compiler counts up several pointers by vector instructions.
    constexpr bool kByPeriods = kHas32Registers && T > 1;
    _Pragma("GCC unroll 1") for (int first = 0; first < kGroups; first += kPeriod) {
        MOESAIC_UNROLL
        for (int g = first; g < first + kPeriod; ++g) {
            prefetch_bytes<kGroupBytes>(ahead + g * kGroupBytes);
            if constexpr (kByPeriods) {
                const ActivationGroup* here[T];
                MOESAIC_UNROLL
                for (int t = 0; t < T; ++t) here[t] = tokens[t] + (g - first);
                add_group<F, T>(tile, scales, g, here, sums);
            } else {
                add_group<F, T>(tile, scales, g, tokens, sums);
                MOESAIC_UNROLL
                for (int t = 0; t < T; ++t) ++tokens[t];
            }
        }
        if constexpr (kByPeriods) {
            MOESAIC_UNROLL
            for (int t = 0; t < T; ++t) tokens[t] += kPeriod;
        }
    }
}

// The same with the block's factor, if it has one.
template <class F, int T>
MOESAIC_INLINE void add_block(const uint8_t* tile, const uint8_t* ahead, const ActivationGroup* (&tokens)[T],
                              vf (&sums)[T]) {
    const typename F::Scales scales = F::load_scales(tile);
    if constexpr (has_block_factor<F>()) {
        vf of_block[T];
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) of_block[t] = set1(0.0f);
        add_groups<F, T>(tile, ahead, scales, tokens, of_block);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) sums[t] = fma(of_block[t], F::block_factor(scales), sums[t]);
    } else {
        add_groups<F, T>(tile, ahead, scales, tokens, sums);
    }
}

// out[t][0..15] for T tokens and one panel.
template <class F, int T>
void direct(const uint8_t* panel, const WeightStream& stream, int64_t num_blocks,
            const ActivationGroup* const* first_groups, float* out) {
    const ActivationGroup* tokens[T];
    vf sums[T];
    for (int t = 0; t < T; ++t) {
        tokens[t] = first_groups[t];
        sums[t] = set1(0.0f);
    }
    for (int64_t b = 0; b < num_blocks; ++b, panel += 16 * F::kBlockBytes) {
        const uint8_t* ahead = WeightStream::ahead_of(stream, panel);
        if constexpr (T == 1 && requires { F::plus_block(panel, ahead, tokens[0], sums[0]); }) {
            sums[0] = F::plus_block(panel, ahead, tokens[0], sums[0]);
            tokens[0] += F::kBlock / 32;
        } else {
            add_block<F, T>(panel, ahead, tokens, sums);
        }
    }
    for (int t = 0; t < T; ++t) store(out + t * kOutputStride, sums[t]);
}

// Tokens up to which weights go straight from the tile.
template <class F>
#ifdef MOESAIC_HAS_NARROW_SUMS
constexpr int kMostDirect = group_period<F>() <= 2 ? 3 : 1;
#else
constexpr int kMostDirect = kHas32Registers ? 8 : 1;
#endif

// direct() for as many tokens as there are, at most T.
template <class F, int T = kMostDirect<F>>
void direct_up_to(const uint8_t* panel, const WeightStream& stream, int64_t num_blocks,
                  const ActivationGroup* const* tokens, int64_t num_tokens, float* out) {
    if constexpr (T > 1) {
        if (num_tokens < T) return direct_up_to<F, T - 1>(panel, stream, num_blocks, tokens, num_tokens, out);
    }
    direct<F, T>(panel, stream, num_blocks, tokens, out);
}
