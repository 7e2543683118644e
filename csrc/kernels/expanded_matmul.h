// Many tokens times quantised weights, of which 256 columns of two panels are expanded at a time; included by
// format_kernels.h inside an anonymous namespace.

constexpr int kChunkGroups = 8;  // groups of 32 columns that are expanded together

// kChunkGroups groups of a panel, ready for many tokens.
struct Expanded {
    alignas(64) uint8_t quads[kChunkGroups][8][64];
    alignas(64) float scales[2 * kChunkGroups][16];
    alignas(64) float offsets[2 * kChunkGroups][16];
    alignas(64) float factors[16];  // has_block_factor(): of the one block that these groups are
};

// Groups [0, num_groups) of the panel whose first tile is `tile`.
template <class F>
void expand(const uint8_t* tile, int num_groups, Expanded& out) {
    constexpr int kGroups = F::kBlock / 32;
    for (int first = 0; first < num_groups; first += kGroups, tile += 16 * F::kBlockBytes) {
        const typename F::Scales scales = F::load_scales(tile);
        if constexpr (has_block_factor<F>()) {
            static_assert(kGroups == kChunkGroups);
            store(out.factors, F::block_factor(scales));
        }
        MOESAIC_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            if constexpr (kHasQuads<F>) {
                MOESAIC_UNROLL
                for (int i = 0; i < 8; ++i) store_b(out.quads[first + g][i], quad_of<F>(tile, scales, g, i));
            } else {
                vb quads[8];
                quads_of_group<F>(tile, scales, g, quads);
                MOESAIC_UNROLL
                for (int i = 0; i < 8; ++i) store_b(out.quads[first + g][i], quads[i]);
            }
            MOESAIC_UNROLL
            for (int h = 0; h < kSubs<F>; ++h) {
                const int sub = (first + g) * kSubs<F> + h;
                store(out.scales[sub], F::scale(scales, g * kSubs<F> + h));
                if constexpr (F::kHasOffset) store(out.offsets[sub], F::offset(scales, g * kSubs<F> + h));
            }
        }
    }
}

// What kLargest may be taken for: as many quads fit, and dot4() is the same.
template <class F>
constexpr int kLargestAlike = kFullRange<F> ? 255 : 127 / kNarrowQuads<F>;

// The traits on which the product of expanded weights depends; formats that agree in them share its code.
template <int ScaleGroup, int ZeroShift, bool HasOffset, int Largest, bool HasWideScales, bool HasBlockFactor>
struct ExpandedTraits {
    static constexpr int kScaleGroup = ScaleGroup, kZeroShift = ZeroShift, kLargest = Largest;
    static constexpr bool kHasOffset = HasOffset, kHasWideScales = HasWideScales;
    static constexpr bool kHasBlockFactor = HasBlockFactor;
};

// How many of the tokens left to take next: as few blocks as possible, of nearly equal size.
MOESAIC_INLINE int64_t next_token_block(int64_t left) {
    const int64_t num_blocks = (left + kBlockTokens - 1) / kBlockTokens;
    return (left + num_blocks - 1) / num_blocks;
}

// dots[t][p] = half `h` of group g (or all of it) of expanded weights times `group` of T tokens, plus the zero point.
template <class F, int T, int P>
MOESAIC_INLINE void dot_half(const Expanded* weights, int g, const ActivationGroup* const* tokens, int64_t group, int h,
                             vi (&dots)[T][P]) {
    constexpr int kQuads = 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int t = 0; t < T; ++t) {
        const vi start = first_sum<F, T>(tokens[t][group], h);
        MOESAIC_UNROLL
        for (int p = 0; p < P; ++p) dots[t][p] = start;
    }
    MOESAIC_UNROLL
    for (int i = kQuads * h; i < kQuads * (h + 1); ++i) {
        vb quads[P];
        MOESAIC_UNROLL
        for (int p = 0; p < P; ++p) quads[p] = load_b(weights[p].quads[g][i]);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const int8_t* four = tokens[t][group].values + 4 * i;
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) dots[t][p] = in_order(dot4<kFullRange<F>>(dots[t][p], quads[p], four));
        }
    }
}

#ifdef MOESAIC_HAS_NARROW_SUMS
// sums[t][p] = the quads from `first` on that a narrow sum takes.
template <class F, int T, int P>
MOESAIC_INLINE void narrow_sums(const Expanded* weights, int g, const ActivationGroup* const* tokens, int64_t group,
                                int first, vs (&sums)[T][P]) {
    constexpr int kQuads = kNarrowQuads<F> < 8 / kSubs<F> ? kNarrowQuads<F> : 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int i = first; i < first + kQuads; ++i) {
        vb quads[P];
        MOESAIC_UNROLL
        for (int p = 0; p < P; ++p) quads[p] = load_b(weights[p].quads[g][i]);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const int8_t* four = tokens[t][group].values + 4 * i;
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) {
                const vs products = narrow_dot4(quads[p], four);
                sums[t][p] = i == first ? products : add(sums[t][p], products);
            }
        }
    }
}

// dot_half() by narrow sums.
template <class F, int T, int P>
    requires(kNarrowQuads<F> > 1)
MOESAIC_INLINE void dot_half(const Expanded* weights, int g, const ActivationGroup* const* tokens, int64_t group, int h,
                             vi (&dots)[T][P]) {
    constexpr int kQuads = 8 / kSubs<F>;
    MOESAIC_UNROLL
    for (int first = kQuads * h; first < kQuads * (h + 1); first += kNarrowQuads<F>) {
        vs sums[T][P];
        narrow_sums<F, T, P>(weights, g, tokens, group, first, sums);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) {
                const vi part = widen(sums[t][p]);
                dots[t][p] = add(first == kQuads * h ? initial_sum<F>(tokens[t][group], h) : dots[t][p], part);
            }
        }
    }
}
#endif

// out[t][16 p + r] += expanded weights times T tokens, from group first_group of each token on.
template <class F, int T, int P>
void multiply(const Expanded* weights, int num_groups, const ActivationGroup* const* tokens, int64_t first_group,
              float* out) {
    vf sums[T][P];
    for (int t = 0; t < T; ++t) {
        for (int p = 0; p < P; ++p) {
            sums[t][p] = has_block_factor<F>() ? set1(0.0f) : load(out + t * kOutputStride + 16 * p);
        }
    }
    for (int g = 0; g < num_groups; ++g) {
        MOESAIC_UNROLL
        for (int h = 0; h < kSubs<F>; ++h) {
            vi dots[T][P];
            dot_half<F, T, P>(weights, g, tokens, first_group + g, h, dots);
            const int sub = g * kSubs<F> + h;
            vf scales[P], biases[P];
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) {
                scales[p] = load(weights[p].scales[sub]);
                biases[p] = mul(scales[p], set1(-kSumBias));
            }
            MOESAIC_UNROLL
            for (int t = 0; t < T; ++t) {
                const ActivationGroup& x = tokens[t][first_group + g];
                MOESAIC_UNROLL
                for (int p = 0; p < P; ++p) {
                    const vf scaled = scaled_dots<F, T>(dots[t][p], scales[p], biases[p]);
                    sums[t][p] = fma(scaled, set1(x.scale), sums[t][p]);
                    if constexpr (F::kHasOffset) {
                        sums[t][p] = fma(load(weights[p].offsets[sub]), scaled_sum<F>(x, h), sums[t][p]);
                    }
                }
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int p = 0; p < P; ++p) {
            float* to = out + t * kOutputStride + 16 * p;
            if constexpr (has_block_factor<F>()) sums[t][p] = fma(sums[t][p], load(weights[p].factors), load(to));
            store(to, sums[t][p]);
        }
    }
}

// multiply() for as many tokens as there are, at most T.
template <class F, int T, int P>
void multiply_up_to(const Expanded* weights, int num_groups, const ActivationGroup* const* tokens, int64_t num_tokens,
                    int64_t first_group, float* out) {
    if constexpr (T > 1) {
        if (num_tokens < T) {
            return multiply_up_to<F, T - 1, P>(weights, num_groups, tokens, num_tokens, first_group, out);
        }
    }
    multiply<F, T, P>(weights, num_groups, tokens, first_group, out);
}

template <class F, int P>
void multiply_all(const Expanded* weights, int num_groups, const ActivationGroup* const* tokens, int64_t num_tokens,
                  int64_t first_group, float* out) {
    for (int64_t t = 0; t < num_tokens;) {
        const int64_t here = next_token_block(num_tokens - t);
        multiply_up_to<F, kBlockTokens, P>(weights, num_groups, tokens + t, here, first_group, out + t * kOutputStride);
        t += here;
    }
}

template <class F>
void matmul_expanded(const uint8_t* panels, int num_panels, int64_t cols, const ActivationGroup* const* tokens,
                     int64_t num_tokens, float* out, const uint8_t* next) {
    using Traits = ExpandedTraits<F::kScaleGroup, F::kZeroShift, F::kHasOffset, kLargestAlike<F>, has_wide_scales<F>(),
                                  has_block_factor<F>()>;
    constexpr int64_t kChunkBytes = kChunkGroups * 32 / F::kBlock * 16 * F::kBlockBytes;
    Expanded expanded[kMaxPanels];
    for (int64_t i = 0; i < num_tokens * kOutputStride; i += 16) store(out + i, set1(0.0f));
    const int64_t total = cols / 32, panel_bytes = cols / F::kBlock * 16 * F::kBlockBytes;
    for (int64_t first = 0; first < total; first += kChunkGroups) {
        const int here = static_cast<int>(total - first < kChunkGroups ? total - first : kChunkGroups);
        const uint8_t* tile = panels + first / kChunkGroups * kChunkBytes;
        const bool last = first + kChunkGroups >= total;
        for (int p = 0; p < num_panels; ++p, tile += panel_bytes) {
            expand<F>(tile, here, expanded[p]);
            prefetch_chunk(last ? next + p * panel_bytes : tile + kChunkBytes, kChunkBytes);
        }
        if (num_panels == kBlockPanels) {
            multiply_all<Traits, kBlockPanels>(expanded, here, tokens, num_tokens, first, out);
            continue;
        }
        for (int p = 0; p < num_panels; ++p) {
            multiply_all<Traits, 1>(expanded + p, here, tokens, num_tokens, first, out + 16 * p);
        }
    }
}
