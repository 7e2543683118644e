// Weights of BF16 and of formats in blocks as tiles take them; included by tile_matmul_bf16.h.
//
// Weights in blocks are expanded to bfloat16, scales applied (AMX has no cheap way to scale integer sums). A byte
// becomes the middle of the mantissa of a float, where a multiply-add scales it and takes off what is too much: six
// vector instructions for 32 weights. They are cut to bfloat16, not rounded.

// Stretched by this, weights that are cut are right in the mean, and values that fit into bfloat16 stay what they are
// (if their bytes are small, see PlacedBytes): the stretch is less than the distance to the next.
constexpr float kCutStretch = 1.0f + 0x1p-8f * 0.72f;

constexpr int kStepBytes = 1024;  // of a tile of weights: 32 columns x 16 rows
constexpr int kChunkSteps = kChunkGroups;

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
        direct_quads<F>(tile, scales, g, bytes.quads);
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
            scale = mul(F::scale(scales, sub), set1(kCutStretch));
            offset = mul(scale, set1(-place.plus() - kZero));
            if constexpr (F::kHasOffset) offset = fma(F::offset(scales, sub), set1(kCutStretch), offset);
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

// Two panels in bfloat16: a ring of kChunkSteps steps, made one at a time.
template <class F>
class ExpandedPanels {
  public:
    // Stores of a step shall not have the lower address bits of the tokens that are loaded meanwhile.
    explicit ExpandedPanels(const uint16_t* tokens) {
        const auto at = reinterpret_cast<uintptr_t>(memory_), like = reinterpret_cast<uintptr_t>(tokens);
        weights_ = memory_ + ((like - at) & (kPageBytes - 64));
    }
    // One or two panels from `tile` on, with num_steps steps to come.
    void start(const uint8_t* tile, int64_t panel_bytes, int num_panels, int64_t num_steps) {
        tile_ = tile;
        panel_bytes_ = panel_bytes;
        num_panels_ = num_panels;
        num_left_ = num_steps;
        MOESAIC_UNROLL
        for (int s = 0; s < kExpandAhead; ++s) expand(s);
    }
    // Before step s of a chunk is multiplied, in the first pass over tokens and in the last: no pass needs what the
    // next chunk overwrites.
    __attribute__((always_inline)) void prepare(int s, bool first_pass, bool last_pass) {
        if (s + kExpandAhead < kChunkSteps ? first_pass : last_pass) expand(s + kExpandAhead);
    }
    // To the next chunk.
    void advance() {
        tile_ += kChunkSteps * 32 / F::kBlock * (16 * F::kBlockBytes);
        num_left_ -= kChunkSteps;
    }
    const uint8_t* weights(int panel) const { return weights_ + panel * kChunkSteps * kStepBytes; }

  private:
    static constexpr int kPageBytes = 4096;

    // Step of this chunk or, from kChunkSteps on, of the next. A chunk is whole blocks: its number says its group.
    __attribute__((always_inline)) void expand(int step) {
        constexpr int kGroups = F::kBlock / 32;
        if (step >= num_left_) return;
        for (int p = 0; p < num_panels_; ++p) {
            const uint8_t* tile = tile_ + p * panel_bytes_ + step / kGroups * (16 * F::kBlockBytes);
            uint8_t* out = weights_ + (p * kChunkSteps + step % kChunkSteps) * kStepBytes;
            if constexpr (F::kQuantized) {
                if (step % kGroups == 0) scales_[p] = F::load_scales(tile);
                expand_bf16_group<F>(tile, scales_[p], step % kGroups, out);
            } else {
                if (step % kGroups == 0) scales_[p] = mul(F::load_scale(tile), set1(kCutStretch));
                expand_bf16_floats<F>(tile, scales_[p], step % kGroups, out);
            }
        }
    }

    const uint8_t* tile_;
    int64_t panel_bytes_, num_left_;
    int num_panels_;
    uint8_t* weights_;
    ScalesOf<F> scales_[2];
    alignas(64) uint8_t memory_[2 * kChunkSteps * kStepBytes + kPageBytes];
};

// BF16 weights lie as tiles want them.
class PackedPanels {
  public:
    explicit PackedPanels(const uint16_t*) {}
    void start(const uint8_t* tile, int64_t panel_bytes, int, int64_t) {
        tile_ = tile;
        panel_bytes_ = panel_bytes;
    }
    void prepare(int, bool, bool) {}
    void advance() { tile_ += kChunkSteps * kStepBytes; }
    const uint8_t* weights(int panel) const { return tile_ + panel * panel_bytes_; }

  private:
    const uint8_t* tile_;
    int64_t panel_bytes_;
};
