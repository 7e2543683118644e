// Few tokens times quantised weights, straight from the packed bytes; included by format_kernels.h inside an anonymous
// namespace.

// out[0..15] for one token and one panel, straight from the packed bytes.
template <class F>
void direct(const uint8_t* panel, const WeightStream& stream, int64_t num_blocks, const ActivationGroup* token,
            float* out) {
    constexpr int kGroups = F::kBlock / 32, kQuads = 8 / kSubs<F>, kGroupBytes = 16 * F::kBlockBytes / kGroups;
    vf sum = set1(0.0f);
    for (int64_t b = 0; b < num_blocks; ++b, panel += 16 * F::kBlockBytes) {
        const uint8_t* ahead = WeightStream::ahead_of(stream, panel);
        const typename F::Scales scales = F::load_scales(panel);
        MOESAIC_UNROLL
        for (int g = 0; g < kGroups; ++g, ++token) {
            prefetch_bytes<kGroupBytes>(ahead + g * kGroupBytes);
            vb quads[8];
            direct_quads<F>(panel, scales, g, quads);
            int8_t in_order[32];
            const int8_t* values = direct_values<F>(*token, in_order);
            MOESAIC_UNROLL
            for (int h = 0; h < kSubs<F>; ++h) {
                vi dots = initial_sum<F>(*token, h);
                MOESAIC_UNROLL
                for (int i = kQuads * h; i < kQuads * (h + 1); ++i) {
                    dots = dot4<kFullRange<F>>(dots, quads[i], values + 4 * i);
                }
                const int sub = g * kSubs<F> + h;
                sum = fma(mul(to_float(dots), F::scale(scales, sub)), set1(token->scale), sum);
                if constexpr (F::kHasOffset) sum = fma(F::offset(scales, sub), scaled_sum<F>(*token, h), sum);
            }
        }
    }
    store(out, sum);
}

#ifdef MOESAIC_HAS_NARROW_SUMS
// dots[t] = half `h` of group g (or all of it) of a tile times T tokens, plus the zero point.
template <class F, int T>
MOESAIC_INLINE void direct_dots(const uint8_t* tile, int g, int h, const ActivationGroup* const (&tokens)[T],
                                vi (&dots)[T]) {
    constexpr int kQuads = 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) dots[t] = initial_sum<F>(*tokens[t], h);
    MOESAIC_UNROLL
    for (int i = kQuads * h; i < kQuads * (h + 1); ++i) {
        const vb quad = F::quad(tile, g, i);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            dots[t] = in_order(dot4<kFullRange<F>>(dots[t], quad, tokens[t]->values + 4 * i));
        }
    }
}

// direct_dots() by narrow sums.
template <class F, int T>
    requires(kNarrowQuads<F> > 1)
MOESAIC_INLINE void direct_dots(const uint8_t* tile, int g, int h, const ActivationGroup* const (&tokens)[T],
                                vi (&dots)[T]) {
    constexpr int kQuads = 8 / kSubs<F>, kChain = kNarrowQuads<F> < kQuads ? kNarrowQuads<F> : kQuads;
    MOESAIC_UNROLL
    for (int first = kQuads * h; first < kQuads * (h + 1); first += kChain) {
        vs sums[T];
        MOESAIC_UNROLL
        for (int i = first; i < first + kChain; ++i) {
            const vb quad = F::quad(tile, g, i);
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

// sums[t] += group g of a tile times a group of T tokens.
template <class F, int T>
MOESAIC_INLINE void add_group(const uint8_t* tile, const typename F::Scales& scales, int g,
                              const ActivationGroup* const (&tokens)[T], vf (&sums)[T]) {
    tile = read_again(tile);  // else what two groups have in common stays in registers, of which there are too few
    MOESAIC_UNROLL
    for (int h = 0; h < kSubs<F>; ++h) {
        vi dots[T];
        direct_dots<F, T>(tile, g, h, tokens, dots);
        const int sub = g * kSubs<F> + h;
        const vf scale = F::scale(scales, sub);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            sums[t] = fma(mul(to_float(dots[t]), scale), set1(tokens[t]->scale), sums[t]);
        }
        if constexpr (F::kHasOffset) {
            const vf offset = F::offset(scales, sub);
            MOESAIC_UNROLL
            for (int t = 0; t < T; ++t) sums[t] = fma(offset, scaled_sum<F>(*tokens[t], h), sums[t]);
        }
    }
}

// direct() for T tokens.
template <class F, int T>
void direct_few(const uint8_t* panel, const WeightStream& stream, int64_t num_blocks,
                const ActivationGroup* const* first_groups, float* out) {
    constexpr int kGroups = F::kBlock / 32, kGroupBytes = 16 * F::kBlockBytes / kGroups, kPeriod = group_period<F>();
    const ActivationGroup* tokens[T];
    vf sums[T];
    for (int t = 0; t < T; ++t) {
        tokens[t] = first_groups[t];
        sums[t] = set1(0.0f);
    }
    for (int64_t b = 0; b < num_blocks; ++b, panel += 16 * F::kBlockBytes) {
        const uint8_t* ahead = WeightStream::ahead_of(stream, panel);
        const typename F::Scales scales = F::load_scales(panel);
        _Pragma("GCC unroll 1") for (int first = 0; first < kGroups; first += kPeriod) {
            MOESAIC_UNROLL
            for (int g = first; g < first + kPeriod; ++g) {
                prefetch_bytes<kGroupBytes>(ahead + g * kGroupBytes);
                add_group<F, T>(panel, scales, g, tokens, sums);
                MOESAIC_UNROLL
                for (int t = 0; t < T; ++t) ++tokens[t];
            }
        }
    }
    for (int t = 0; t < T; ++t) store(out + t * kOutputStride, sums[t]);
}
#endif

// Tokens up to which weights go straight from the tile.
template <class F>
#ifdef MOESAIC_HAS_NARROW_SUMS
constexpr int kMostDirect = group_period<F>() <= 2 ? 3 : 1;
#else
constexpr int kMostDirect = 1;
#endif

// num_tokens <= kMostDirect<F> tokens, one panel.
template <class F>
void direct_up_to(const uint8_t* panel, const WeightStream& stream, int64_t num_blocks,
                  const ActivationGroup* const* tokens, [[maybe_unused]] int64_t num_tokens, float* out) {
#ifdef MOESAIC_HAS_NARROW_SUMS
    if constexpr (kMostDirect<F> == 3) {
        if (num_tokens == 2) return direct_few<F, 2>(panel, stream, num_blocks, tokens, out);
        if (num_tokens == 3) return direct_few<F, 3>(panel, stream, num_blocks, tokens, out);
    }
#endif
    direct<F>(panel, stream, num_blocks, tokens[0], out);
}
