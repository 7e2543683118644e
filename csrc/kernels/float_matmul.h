// Float weights times float activations; included by matmul.isa.cpp inside its anonymous namespace.

constexpr int kFloatChunk = 256;  // columns that are converted together for many tokens

// Bytes of `cols` columns of a panel.
template <class F>
constexpr int64_t float_panel_bytes(int64_t cols) {
    return cols / F::kBlock * 16 * F::kBlockBytes;
}

// convert_cols() for a format in blocks; first_col and num_cols are multiples of the block.
template <class F>
void convert_blocks(const uint8_t* panel, int64_t first_col, int num_cols, float* out) {
    const uint8_t* tile = panel + float_panel_bytes<F>(first_col);
    for (int first = 0; first < num_cols; first += F::kBlock, tile += 16 * F::kBlockBytes) {
        const vf scale = F::load_scale(tile);
        for (int k = 0; k < F::kBlock; k += F::kStep, out += 16 * F::kStep) {
            vf weights[F::kStep];
            F::load_weights(tile + 16 * k, weights);
            MOESAIC_UNROLL
            for (int s = 0; s < F::kStep; ++s) store(out + 16 * s, mul(weights[s], scale));
        }
    }
}

// convert_cols() for a format without blocks; first_col is even.
template <class F>
void convert_floats(const uint8_t* panel, int64_t first_col, int num_cols, float* out) {
    const uint8_t* tile = panel + first_col * 16 * F::kBlockBytes;
    int k = 0;
    for (; k + F::kStep <= num_cols; k += F::kStep, tile += 16 * F::kStep * F::kBlockBytes) {
        vf weights[F::kStep];
        F::load_weights(tile, weights);
        for (int s = 0; s < F::kStep; ++s) store(out + 16 * (k + s), weights[s]);
    }
    if constexpr (F::kStep == 2) {
        if (k < num_cols) store(out + 16 * k, F::load_last(tile));
    }
}

// Columns [first_col, first_col + num_cols) of a panel as floats [num_cols][16].
template <class F>
void convert_cols(const uint8_t* panel, int64_t first_col, int num_cols, float* out) {
    if constexpr (F::kBlock > 1) {
        convert_blocks<F>(panel, first_col, num_cols, out);
    } else {
        convert_floats<F>(panel, first_col, num_cols, out);
    }
}

// Several sums per token hide the latency of fma.
template <int T>
constexpr int kChains = T == 1 ? 8 : (T == 2 ? 4 : 2);

// direct_float() for a format in blocks: the sums of a block are scaled at its end.
template <class F, int T>
void direct_float_blocks(const uint8_t* panel, const WeightStream& stream, int64_t cols, const float* const* tokens,
                         float* out) {
    constexpr int kN = kChains<T>, kUnrolled = 2 * F::kStep;
    constexpr int kScaleBytes = 16 * (F::kBlockBytes - F::kBlock);
    for (int t = 0; t < T; ++t) store(out + t * kOutputStride, set1(0.0f));
    for (int64_t first = 0; first < cols; first += F::kBlock, panel += 16 * F::kBlockBytes) {
        const uint8_t* ahead = WeightStream::ahead_of(stream, panel);
        vf sums[T][kN];
        for (int t = 0; t < T; ++t) {
            for (int c = 0; c < kN; ++c) sums[t][c] = set1(0.0f);
        }
        for (int k = 0; k < F::kBlock; k += kUnrolled) {
            prefetch_bytes<16 * kUnrolled>(ahead + 16 * k);
            MOESAIC_UNROLL
            for (int j = 0; j < kUnrolled; j += F::kStep) {
                vf weights[F::kStep];
                F::load_weights(panel + 16 * (k + j), weights);
                MOESAIC_UNROLL
                for (int t = 0; t < T; ++t) {
                    for (int s = 0; s < F::kStep; ++s) {
                        vf& sum = sums[t][(j + s) % kN];
                        sum = fma(weights[s], set1(tokens[t][first + k + j + s]), sum);
                    }
                }
            }
        }
        prefetch_bytes<kScaleBytes>(ahead + 16 * F::kBlock);
        const vf scale = F::load_scale(panel);
        for (int t = 0; t < T; ++t) {
            vf sum = sums[t][0];
            for (int c = 1; c < kN; ++c) sum = add(sum, sums[t][c]);
            store(out + t * kOutputStride, fma(sum, scale, load(out + t * kOutputStride)));
        }
    }
}

// out[t][0..15] for T tokens and one panel, straight from the packed bytes.
template <class F, int T>
void direct_float(const uint8_t* panel, const WeightStream& stream, int64_t cols, const float* const* tokens,
                  float* out) {
    constexpr int kN = kChains<T>;
    vf sums[T][kN];
    for (int t = 0; t < T; ++t) {
        for (int c = 0; c < kN; ++c) sums[t][c] = set1(0.0f);
    }
    int64_t k = 0;
    for (; k + kN <= cols; k += kN) {
        prefetch_bytes<16 * kN * F::kBlockBytes>(WeightStream::ahead_of(stream, panel));
        MOESAIC_UNROLL
        for (int c = 0; c < kN; c += F::kStep, panel += 16 * F::kStep * F::kBlockBytes) {
            vf weights[F::kStep];
            F::load_weights(panel, weights);
            MOESAIC_UNROLL
            for (int t = 0; t < T; ++t) {
                for (int s = 0; s < F::kStep; ++s) {
                    sums[t][c + s] = fma(weights[s], set1(tokens[t][k + c + s]), sums[t][c + s]);
                }
            }
        }
    }
    float rest[16 * kN];
    const int num_rest = static_cast<int>(cols - k);
    convert_floats<F>(panel, 0, num_rest, rest);
    for (int t = 0; t < T; ++t) {
        vf sum = sums[t][0];
        for (int c = 1; c < kN; ++c) sum = add(sum, sums[t][c]);
        for (int c = 0; c < num_rest; ++c) sum = fma(load(rest + 16 * c), set1(tokens[t][k + c]), sum);
        store(out + t * kOutputStride, sum);
    }
}

// out[t][16 p + r] += weights [num_cols][16] of P panels times T tokens, from column first_col of each token on.
template <int T, int P>
void multiply_float(const float (*weights)[16 * kFloatChunk], int num_cols, const float* const* tokens,
                    int64_t first_col, float* out) {
    vf sums[T][P];
    const float* x[T];
    for (int t = 0; t < T; ++t) {
        x[t] = tokens[t] + first_col;
        for (int p = 0; p < P; ++p) sums[t][p] = load(out + t * kOutputStride + 16 * p);
    }
    for (int k = 0; k < num_cols; ++k) {
        vf w[P];
        MOESAIC_UNROLL
        for (int p = 0; p < P; ++p) w[p] = load(weights[p] + 16 * k);
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const vf value = set1(x[t][k]);
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) sums[t][p] = fma(w[p], value, sums[t][p]);
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int p = 0; p < P; ++p) store(out + t * kOutputStride + 16 * p, sums[t][p]);
    }
}

// multiply_float() for as many tokens as there are, at most T.
template <int T, int P>
void multiply_float_up_to(const float (*weights)[16 * kFloatChunk], int num_cols, const float* const* tokens,
                          int64_t num_tokens, int64_t first_col, float* out) {
    if constexpr (T > 1) {
        if (num_tokens < T) {
            return multiply_float_up_to<T - 1, P>(weights, num_cols, tokens, num_tokens, first_col, out);
        }
    }
    multiply_float<T, P>(weights, num_cols, tokens, first_col, out);
}

template <int P>
void multiply_float_all(const float (*weights)[16 * kFloatChunk], int num_cols, const float* const* tokens,
                        int64_t num_tokens, int64_t first_col, float* out) {
    for (int64_t t = 0; t < num_tokens;) {
        const int64_t here = next_token_block(num_tokens - t);
        multiply_float_up_to<kBlockTokens, P>(weights, num_cols, tokens + t, here, first_col, out + t * kOutputStride);
        t += here;
    }
}

template <class F>
void float_matmul_many(const uint8_t* panels, int num_panels, int64_t cols, const float* const* tokens,
                       int64_t num_tokens, float* out, const uint8_t* next) {
    constexpr int64_t kChunkBytes = float_panel_bytes<F>(kFloatChunk);
    alignas(64) float weights[kMaxPanels][16 * kFloatChunk];
    for (int64_t i = 0; i < num_tokens * kOutputStride; i += 16) store(out + i, set1(0.0f));
    const int64_t panel_bytes = float_panel_bytes<F>(cols);
    for (int64_t first = 0; first < cols; first += kFloatChunk) {
        const int here = static_cast<int>(cols - first < kFloatChunk ? cols - first : kFloatChunk);
        const bool last = first + kFloatChunk >= cols;
        for (int p = 0; p < num_panels; ++p) {
            const uint8_t* panel = panels + p * panel_bytes;
            convert_cols<F>(panel, first, here, weights[p]);
            prefetch_chunk(last ? next + p * panel_bytes : panel + (first / kFloatChunk + 1) * kChunkBytes,
                           kChunkBytes);
        }
        if (num_panels == kBlockPanels) {
            multiply_float_all<kBlockPanels>(weights, here, tokens, num_tokens, first, out);
            continue;
        }
        for (int p = 0; p < num_panels; ++p) {
            multiply_float_all<1>(weights + p, here, tokens, num_tokens, first, out + 16 * p);
        }
    }
}

// direct_float() for as many tokens as there are, at most T.
template <class F, int T>
void direct_float_up_to(const uint8_t* panels, int num_panels, int64_t cols, const float* const* tokens,
                        int64_t num_tokens, float* out, const uint8_t* next) {
    if constexpr (T > 1) {
        if (num_tokens < T) {
            return direct_float_up_to<F, T - 1>(panels, num_panels, cols, tokens, num_tokens, out, next);
        }
    }
    const int64_t panel_bytes = float_panel_bytes<F>(cols);
    const WeightStream stream{panels + num_panels * panel_bytes, next};
    for (int p = 0; p < num_panels; ++p) {
        if constexpr (F::kBlock > 1) {
            direct_float_blocks<F, T>(panels + p * panel_bytes, stream, cols, tokens, out + 16 * p);
        } else {
            direct_float<F, T>(panels + p * panel_bytes, stream, cols, tokens, out + 16 * p);
        }
    }
}

template <class F>
void float_matmul(const uint8_t* panels, int num_panels, int64_t cols, const void* const* opaque_tokens,
                  int64_t num_tokens, float* out, const uint8_t* next) {
    const auto* tokens = reinterpret_cast<const float* const*>(opaque_tokens);
    if (num_tokens > kDirectTokens) {
        float_matmul_many<F>(panels, num_panels, cols, tokens, num_tokens, out, next);
    } else {
        direct_float_up_to<F, kDirectTokens>(panels, num_panels, cols, tokens, num_tokens, out, next);
    }
}
