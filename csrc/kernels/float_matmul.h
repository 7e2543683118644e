// Float weights times float activations; included by matmul.isa.cpp inside its anonymous namespace.
//
// A sum goes through the columns in order whatever the number of tokens, so that what a token gets does not depend on
// how many there are; the sums of two panels at once hide the latency of fma.

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

// P panels that a thread goes through together, each to its end.
template <int P>
struct PanelColumns {
    const uint8_t* at[P];
    WeightStream streams[P];
};

// The next kBytes of each panel will be read soon.
template <int kBytes, int P>
MOESAIC_INLINE void prefetch_columns(const PanelColumns<P>& panels) {
    MOESAIC_UNROLL
    for (int p = 0; p < P; ++p) prefetch_bytes<kBytes>(WeightStream::ahead_of(panels.streams[p], panels.at[p]));
}

template <int P>
MOESAIC_INLINE void advance(PanelColumns<P>& panels, int64_t num_bytes) {
    MOESAIC_UNROLL
    for (int p = 0; p < P; ++p) panels.at[p] += num_bytes;
}

// sums[t][p] += F::kStep columns of weights, times the scale of their block if F has blocks, times T tokens.
template <class F, int T, int P>
MOESAIC_INLINE void add_columns(const PanelColumns<P>& panels, const vf (&scales)[P], const float* const* tokens,
                                int64_t col, vf (&sums)[T][P]) {
    vf weights[P][F::kStep];
    MOESAIC_UNROLL
    for (int p = 0; p < P; ++p) {
        F::load_weights(panels.at[p], weights[p]);
        if constexpr (F::kBlock > 1) {
            MOESAIC_UNROLL
            for (int s = 0; s < F::kStep; ++s) weights[p][s] = mul(weights[p][s], scales[p]);
        }
    }
    MOESAIC_UNROLL
    for (int s = 0; s < F::kStep; ++s) {
        MOESAIC_UNROLL
        for (int t = 0; t < T; ++t) {
            const vf value = set1(tokens[t][col + s]);
            MOESAIC_UNROLL
            for (int p = 0; p < P; ++p) sums[t][p] = fma(weights[p][s], value, sums[t][p]);
        }
    }
}

// All columns of a format in blocks.
template <class F, int T, int P>
MOESAIC_INLINE void add_blocks(PanelColumns<P>& panels, int64_t cols, const float* const* tokens, vf (&sums)[T][P]) {
    constexpr int kScaleBytes = 16 * (F::kBlockBytes - F::kBlock);
    for (int64_t first = 0; first < cols; first += F::kBlock) {
        vf scales[P];
        for (int p = 0; p < P; ++p) scales[p] = F::load_scale(panels.at[p]);
        for (int k = 0; k < F::kBlock; k += F::kStep) {
            prefetch_columns<16 * F::kStep>(panels);
            add_columns<F, T, P>(panels, scales, tokens, first + k, sums);
            advance(panels, 16 * F::kStep);
        }
        prefetch_columns<kScaleBytes>(panels);
        advance(panels, kScaleBytes);
    }
}

// All columns of a format without blocks.
template <class F, int T, int P>
MOESAIC_INLINE void add_floats(PanelColumns<P>& panels, int64_t cols, const float* const* tokens, vf (&sums)[T][P]) {
    constexpr int kUnrolled = 4;  // columns
    const vf none[P] = {};
    int64_t k = 0;
    for (; k + kUnrolled <= cols; k += kUnrolled) {
        prefetch_columns<16 * kUnrolled * F::kBlockBytes>(panels);
        MOESAIC_UNROLL
        for (int s = 0; s < kUnrolled; s += F::kStep) {
            add_columns<F, T, P>(panels, none, tokens, k + s, sums);
            advance(panels, 16 * F::kStep * F::kBlockBytes);
        }
    }
    for (; k + F::kStep <= cols; k += F::kStep) {
        add_columns<F, T, P>(panels, none, tokens, k, sums);
        advance(panels, 16 * F::kStep * F::kBlockBytes);
    }
    if constexpr (F::kStep == 2) {
        if (k == cols) return;
        for (int p = 0; p < P; ++p) {
            const vf last = F::load_last(panels.at[p]);
            for (int t = 0; t < T; ++t) sums[t][p] = fma(last, set1(tokens[t][k]), sums[t][p]);
        }
    }
}

// out[t][16 p + r] = P panels times T tokens, straight from the packed bytes.
template <class F, int T, int P>
void direct_float(const uint8_t* panels, int64_t cols, const float* const* tokens, float* out, const uint8_t* next) {
    const int64_t panel_bytes = float_panel_bytes<F>(cols);
    PanelColumns<P> columns;
    vf sums[T][P];
    for (int p = 0; p < P; ++p) {
        columns.at[p] = panels + p * panel_bytes;
        columns.streams[p] = {columns.at[p] + panel_bytes, next + p * panel_bytes};
        for (int t = 0; t < T; ++t) sums[t][p] = set1(0.0f);
    }
    if constexpr (F::kBlock > 1) {
        add_blocks<F, T, P>(columns, cols, tokens, sums);
    } else {
        add_floats<F, T, P>(columns, cols, tokens, sums);
    }
    for (int t = 0; t < T; ++t) {
        for (int p = 0; p < P; ++p) store(out + t * kOutputStride + 16 * p, sums[t][p]);
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
    if (num_panels == kMaxPanels) {
        direct_float<F, T, kMaxPanels>(panels, cols, tokens, out, next);
    } else {
        direct_float<F, T, 1>(panels, cols, tokens, out, next);
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
