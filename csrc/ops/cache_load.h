// How 16 elements of a cache become floats; for *.isa.cpp units only, inside their anonymous namespace.

struct LoadF32 {
    using Element = float;
    static constexpr bool kIsBF16 = false;
    static vf full(const float* p) { return load(p); }
    static vf partial(const float* p, int n) { return load_n(p, n); }
};

// The first n elements, the others zero, without reading behind them.
MOESAIC_INLINE void copy_first(const uint16_t* p, int n, uint16_t (&to)[16]) {
    for (int i = 0; i < 16; ++i) to[i] = i < n ? p[i] : uint16_t{0};
}

struct LoadBF16 {
    using Element = uint16_t;
    static constexpr bool kIsBF16 = true;
    static vf full(const uint16_t* p) { return load_bf16(p); }
    static vf partial(const uint16_t* p, int n) {
        uint16_t first[16];
        copy_first(p, n, first);
        return load_bf16(first);
    }
};

struct LoadF16 {
    using Element = uint16_t;
    static constexpr bool kIsBF16 = false;
    static vf full(const uint16_t* p) { return load_f16(p); }
    static vf partial(const uint16_t* p, int n) {
        uint16_t first[16];
        copy_first(p, n, first);
        return load_f16(first);
    }
};
