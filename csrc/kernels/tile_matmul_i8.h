// Quantised weights times int8 activations by tiles; included by format_kernels.h where there are tiles.
//
// Numerically what multiply() does: exact integer sums of 16 or 32 weights, scaled in float. A tile instruction gives the
// sums of 16 rows and up to 16 tokens; scaling them takes longer than the instruction, and both overlap.

constexpr int64_t kTileMinTokens = 6;  // fewer are faster without tiles

// Whether tokens lie equally far apart, and how far.
bool find_token_stride(const ActivationGroup* const* tokens, int64_t num_tokens, int64_t& stride) {
    stride = num_tokens > 1 ? tokens[1] - tokens[0] : 0;
    for (int64_t t = 1; t < num_tokens; ++t) {
        if (tokens[t] - tokens[0] != t * stride) return false;
    }
    return true;
}

// dots[h][t][row] of a group: signed weights [8][16][4] times the values of the tokens.
template <int kSubs>
MOESAIC_INLINE void tile_group(const uint8_t* quads, const int8_t* values, int64_t token_bytes, int32_t* dots) {
    MOESAIC_TILE_LOAD(4, values, token_bytes);
    MOESAIC_TILE_LOAD(6, quads, 64);
    MOESAIC_TILE_ZERO(0);
    MOESAIC_TILE_DOT_I8(0, 4, 6);
    MOESAIC_TILE_STORE(0, dots, 64);
    if constexpr (kSubs == 2) {
        MOESAIC_TILE_LOAD(5, values + 16, token_bytes);
        MOESAIC_TILE_LOAD(7, quads + 256, 64);
        MOESAIC_TILE_ZERO(1);
        MOESAIC_TILE_DOT_I8(1, 5, 7);
        MOESAIC_TILE_STORE(1, dots + 256, 64);
    }
}

// out[t][0..15] += expanded signed weights of one panel times num_tokens <= T tokens.
template <class F, int T>
void multiply_tile(const Expanded& weights, int num_groups, const ActivationGroup* tokens, int64_t stride,
                   int64_t num_tokens, float* out) {
    constexpr int kAhead = 2, kBuffers = 4;  // groups whose sums the tile unit is ahead
    alignas(64) int32_t dots[kBuffers][kSubs<F>][16][16];
    const int64_t token_bytes = stride * static_cast<int64_t>(sizeof(ActivationGroup));
    auto start = [&](int g) {
        if (g < num_groups) {
            tile_group<kSubs<F>>(weights.quads[g][0], tokens[g].values, token_bytes, dots[g % kBuffers][0][0]);
        }
    };
    vf sums[T];
    for (int t = 0; t < T; ++t) sums[t] = load(out + t * kOutputStride);
    for (int g = 0; g < kAhead; ++g) start(g);
    for (int g = 0; g < num_groups; ++g) {
        start(g + kAhead);
        MOESAIC_UNROLL
        for (int h = 0; h < kSubs<F>; ++h) {
            const vf scale = load(weights.scales[g * kSubs<F> + h]);
            const ActivationGroup* x = tokens + g;
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t, x += stride) {
                const vf scaled = mul(to_float(load_i(dots[g % kBuffers][h][t])), scale);
                sums[t] = fma(scaled, set1(x->scale), sums[t]);
                if constexpr (F::kHasOffset) {
                    sums[t] = fma(load(weights.offsets[g * kSubs<F> + h]), scaled_sum<F>(*x, h), sums[t]);
                }
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        if (t < num_tokens) store(out + t * kOutputStride, sums[t]);
    }
}

// multiply_tile() over all tokens, in tiles of nearly equal size.
template <class F>
void multiply_tiles(const Expanded& weights, int num_groups, const ActivationGroup* tokens, int64_t stride,
                    int64_t num_tokens, float* out) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    const int64_t rows = (num_tokens + num_tiles - 1) / num_tiles;
    configure_tiles(static_cast<int>(rows), 32 / kSubs<F>);
    for (int64_t t = 0; t < num_tokens; t += rows, tokens += rows * stride, out += rows * kOutputStride) {
        if (rows > 12) {
            multiply_tile<F, 16>(weights, num_groups, tokens, stride, rows, out);
        } else if (rows > 8) {
            multiply_tile<F, 12>(weights, num_groups, tokens, stride, rows, out);
        } else {
            multiply_tile<F, 8>(weights, num_groups, tokens, stride, rows, out);
        }
    }
}
