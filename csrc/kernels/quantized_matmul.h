// Quantised weights times int8 activations; included by format_kernels.h inside an anonymous namespace.
//
// One token (on some instruction sets a few): weights go from the tile to registers and are multiplied there (bound by
// memory). More: 256 columns of two panels are expanded to bytes and float scales in the L1 cache, then every token
// passes over them (bound by dot4). The sums of a group of 16 or 32 weights are exact integers; scales are applied in
// float.

template <class F>
void quantized_matmul(const uint8_t* panels, int num_panels, int64_t cols, const void* const* opaque_tokens,
                      int64_t num_tokens, float* out, const uint8_t* next) {
    const auto* tokens = reinterpret_cast<const ActivationGroup* const*>(opaque_tokens);
    if (num_tokens > kMostDirect<F>) {
        return matmul_expanded<F>(panels, num_panels, cols, tokens, num_tokens, out, next);
    }
    const int64_t num_blocks = cols / F::kBlock, panel_bytes = num_blocks * 16 * F::kBlockBytes;
    const WeightStream stream{panels + num_panels * panel_bytes, next};
    for (int p = 0; p < num_panels; ++p) {
        direct_up_to<F>(panels + p * panel_bytes, stream, num_blocks, tokens, num_tokens, out + 16 * p);
    }
}

// Columns [first_col, first_col + num_cols) of a panel as floats [num_cols][16].
template <class F>
void dequantize_cols(const uint8_t* panel, int64_t first_col, int num_cols, float* out) {
    constexpr int kGroups = F::kBlock / 32;
    const uint8_t* tile = panel + first_col / F::kBlock * 16 * F::kBlockBytes;
    const vf zero = set1(F::kZeroShift >= 0 ? -static_cast<float>(1 << F::kZeroShift) : 0.0f);
    for (int k = 0; k < num_cols; k += F::kBlock, tile += 16 * F::kBlockBytes) {
        const typename F::Scales scales = F::load_scales(tile);
        for (int g = 0; g < kGroups; ++g) {
            vb quads[8];
            quads_of_group<F>(tile, scales, g, quads);
            for (int i = 0; i < 8; ++i) {
                const int sub = (32 * g + 4 * i) / F::kScaleGroup;
                const vf scale = whole_scale<F>(scales, sub);
                vf offset = mul(scale, zero);
                if constexpr (F::kHasOffset) offset = add(offset, whole_offset<F>(scales, sub));
                for (int b = 0; b < 4; ++b, out += 16) {
                    store(out, fma(to_float(byte_of_lane(quads[i], b)), scale, offset));
                }
            }
        }
    }
}
