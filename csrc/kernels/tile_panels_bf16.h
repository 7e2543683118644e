// Weights of BF16 and of formats in blocks as tiles take them; included by tile_matmul_bf16.h.
//
// Weights in blocks are expanded to bfloat16, scales applied (AMX has no cheap way to scale integer sums). A byte
// becomes the middle of the mantissa of a float, where a multiply-add scales it and takes off what is too much: six
// vector instructions for 32 weights. They are cut to bfloat16, not rounded.

// Stretched by this, weights that are cut are right in the mean, and values that fit into bfloat16 stay what they are
// (if their bytes are small, see PlacedBytes): the stretch is less than the distance to the next.
constexpr float kCutStretch = 1.0f + 0x1p-8f * 0.72f;

// A step is 32 columns x 16 rows of weights. Steps come in chunks, whole blocks of any format.
constexpr int kStepBytes = 1024;
constexpr int kChunkSteps = 8;
template <class F>
constexpr int64_t kPackedStepBytes = 32 * 16 * F::kBlockBytes / F::kBlock;

// The largest byte of group g of a block.
template <class F>
constexpr int largest_of_group([[maybe_unused]] int g) {
    if constexpr (requires { F::largest(g); }) return F::largest(g);
    return F::kLargest;
}

// Bytes of a group of weights: quads, or mixed as they come (quantized_traits.h), which saves putting them in order.
template <class F>
struct GroupBytes {
    vb quads[8];

    MOESAIC_INLINE GroupBytes of(const uint8_t* tile, const typename F::Scales& scales, int g) {
        GroupBytes bytes;
#ifdef MOESAIC_HAS_BYTE_TABLES
        if constexpr (kMixesQuads<F>) {
            F::mixed_group(tile, scales, g, bytes.quads);
            return bytes;
        }
#endif
        quads_of_group<F>(tile, scales, g, bytes.quads);
        return bytes;
    }
    // Byte b of quad i of 16 rows, as a float plus a constant.
    __attribute__((always_inline)) vf weight(PlacedBytes place, int i, int b) const {
#ifdef MOESAIC_HAS_BYTE_TABLES
        if constexpr (kMixesQuads<F>) {
            const int from = kMixedPlaces<F>.of_quad[i];
            return byte_of_lane_as_float(place, quads[from / 4 * 4 + b], from % 4);
        }
#endif
        return byte_of_lane_as_float(place, quads[i], b);
    }
};

// Group g of a tile of weights as [16 pairs of columns][16 rows][2] bfloat16.
template <class F>
MOESAIC_INLINE void expand_bf16_group(const uint8_t* tile, const typename F::Scales& scales, int g, uint8_t* out) {
    const GroupBytes<F> bytes = GroupBytes<F>::of(tile, scales, g);
    const PlacedBytes place{largest_of_group<F>(g) <= 127};
    constexpr float kZero = F::kZeroShift >= 0 ? static_cast<float>(1 << F::kZeroShift) : 0.0f;
    vf scale, offset;
    MOESAIC_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i % (8 / kSubs<F>) == 0) {
            const int sub = g * kSubs<F> + i / (8 / kSubs<F>);
            scale = mul(whole_scale<F>(scales, sub), set1(kCutStretch));
            offset = mul(scale, set1(-place.plus() - kZero));
            if constexpr (F::kHasOffset) offset = fma(whole_offset<F>(scales, sub), set1(kCutStretch), offset);
        }
        MOESAIC_UNROLL
        for (int b = 0; b < 4; b += 2) {
            const vf even = fma(bytes.weight(place, i, b), scale, offset);
            const vf odd = fma(bytes.weight(place, i, b + 1), scale, offset);
            store_b(out + 128 * i + 32 * b, cut_to_bf16_pairs(even, odd));
        }
    }
}

// The same of a float format in blocks (FP8): step g of 32 columns of a block.
template <class F>
MOESAIC_INLINE void expand_bf16_floats(const uint8_t* tile, vf scale, int g, uint8_t* out) {
    MOESAIC_UNROLL
    for (int k = 0; k < 32; k += F::kStep) {
        vf w[F::kStep];
        F::load_weights(tile + 16 * (32 * g + k), w);
        MOESAIC_UNROLL
        for (int s = 0; s < F::kStep; s += 2) {
            store_b(out + 32 * (k + s), cut_to_bf16_pairs(mul(w[s], scale), mul(w[s + 1], scale)));
        }
    }
}

// What is loaded once per block of a panel.
template <class F>
struct ScalesOfBlock {
    using Type = vf;
};
template <class F>
    requires(F::kQuantized)
struct ScalesOfBlock<F> {
    using Type = typename F::Scales;
};
template <class F>
using ScalesOf = typename ScalesOfBlock<F>::Type;

// Weights are expanded so many steps before they are multiplied: what was stored has then left the store buffer, from
// which tiles cannot be loaded.
constexpr int kExpandAhead = 2;

// Two panels in bfloat16: a ring of a chunk's steps, made one at a time.
template <class F>
class ExpandedPanels {
  public:
    // Stores of a step shall not have the lower address bits of the tokens that are loaded meanwhile.
    ExpandedPanels(const uint16_t* tokens, int64_t panel_bytes) : panel_bytes_(panel_bytes) {
        const auto at = reinterpret_cast<uintptr_t>(memory_), like = reinterpret_cast<uintptr_t>(tokens);
        weights_ = memory_ + ((like - at) & (kPageBytes - 64));
    }
    // One or two panels from `tile` on, with num_steps steps to come, and then those from `then` on.
    void start(const uint8_t* tile, int num_panels, int64_t num_steps, const uint8_t* then) {
        tile_ = tile;
        num_panels_ = num_panels;
        num_left_ = num_steps;
        then_ = then;
        MOESAIC_UNROLL
        for (int s = 0; s < kExpandAhead; ++s) {
            expand(s, 0);
            if (num_panels == 2) expand(s, 1);
        }
    }
    // Before step s of a chunk is multiplied with a panel, in the first pass over tokens and in the last: no pass needs
    // what the next chunk overwrites.
    __attribute__((always_inline)) void prepare(int s, int panel, bool first_pass, bool last_pass) {
        if (panel >= num_panels_) return;
        if (s + kExpandAhead < kChunkSteps ? first_pass : last_pass) expand(s + kExpandAhead, panel);
        if (first_pass) {
            const uint8_t* next = num_left_ > kChunkSteps ? tile_ + kChunkSteps * kPackedStepBytes<F> : then_;
            prefetch_step<kPackedStepBytes<F>>(next + panel * panel_bytes_, s);
        }
    }
    // To the next chunk.
    void advance() {
        tile_ += kChunkSteps * kPackedStepBytes<F>;
        num_left_ -= kChunkSteps;
    }
    const uint8_t* weights(int panel) const {
        return weights_ + (panel < num_panels_ ? panel : 0) * kChunkSteps * kStepBytes;
    }

  private:
    static constexpr int kPageBytes = 4096;

    // Step s of this chunk or, from kChunkSteps on, of the next.
    __attribute__((always_inline)) void expand(int s, int p) {
        constexpr int kGroups = F::kBlock / 32;
        if (s >= num_left_) return;
        const uint8_t* tile = tile_ + p * panel_bytes_ + s / kGroups * kGroups * kPackedStepBytes<F>;
        uint8_t* out = weights_ + (p * kChunkSteps + s % kChunkSteps) * kStepBytes;
        if constexpr (F::kQuantized) {
            if (s % kGroups == 0) scales_[p] = F::load_scales(tile);
            expand_bf16_group<F>(tile, scales_[p], s % kGroups, out);
        } else {
            if (s % kGroups == 0) scales_[p] = mul(F::load_scale(tile), set1(kCutStretch));
            expand_bf16_floats<F>(tile, scales_[p], s % kGroups, out);
        }
    }

    const uint8_t *tile_, *then_;
    int64_t panel_bytes_, num_left_;
    int num_panels_;
    uint8_t* weights_;
    ScalesOf<F> scales_[2];
    alignas(64) uint8_t memory_[2 * kChunkSteps * kStepBytes + kPageBytes];
};

// BF16 weights lie as tiles want them.
class PackedPanels {
  public:
    PackedPanels(const uint16_t*, int64_t panel_bytes) : panel_bytes_(panel_bytes) {}
    void start(const uint8_t* tile, int num_panels, int64_t num_steps, const uint8_t* then) {
        tile_ = tile;
        num_panels_ = num_panels;
        num_left_ = num_steps;
        then_ = then;
    }
    __attribute__((always_inline)) void prepare(int s, int panel, bool first_pass, bool) {
        if (!first_pass || panel >= num_panels_) return;
        const uint8_t* next = num_left_ > kChunkSteps ? tile_ + kChunkSteps * kStepBytes : then_;
        prefetch_step<kStepBytes>(next + panel * panel_bytes_, s);
    }
    void advance() {
        tile_ += kChunkSteps * kStepBytes;
        num_left_ -= kChunkSteps;
    }
    const uint8_t* weights(int panel) const { return tile_ + (panel < num_panels_ ? panel : 0) * panel_bytes_; }

  private:
    const uint8_t *tile_, *then_;
    int64_t panel_bytes_, num_left_;
    int num_panels_;
};
