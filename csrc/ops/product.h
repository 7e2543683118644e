// Small dense products in registers, for *.isa.cpp units only (include it inside the unit's anonymous namespace).
//
//   c[rows][16 * vectors] (+)= a[rows][depth] * b[depth][16 * vectors]
//
// The element k of a row is at a + row * a_row + k; vector v of step k is at b + k * b_step + v * b_vector. So b may be
// a row-major matrix (b_vector 16) or panels of 16 columns (b_step 16).

// Registers of a tile: kTileRows x kTileVectors sums, and the operands of one step.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kHas32Registers ? 4 : 1;

struct ProductArgs {
    const float* a;
    int64_t a_row;
    const float* b;
    int64_t b_step, b_vector;
    float* c;
    int64_t c_row;
    int64_t rows, vectors, depth;
    bool accumulate;
};

// R x V vectors of c stay in registers over the whole depth.
template <int R, int V>
void product_tile(const ProductArgs& p, int64_t row, int64_t vector) {
    const float* a = p.a + row * p.a_row;
    const float* b = p.b + vector * p.b_vector;
    float* c = p.c + row * p.c_row + 16 * vector;
    vf sum[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sum[r][v] = p.accumulate ? load(c + r * p.c_row + 16 * v) : set1(0.0f);
    }
    for (int64_t k = 0; k < p.depth; ++k) {
        vf right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + k * p.b_step + v * p.b_vector);
        for (int r = 0; r < R; ++r) {
            const vf left = set1(a[r * p.a_row + k]);
            for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(c + r * p.c_row + 16 * v, sum[r][v]);
    }
}

template <int R, int V>
void product_last_rows(const ProductArgs& p, int64_t row, int64_t vector) {
    if constexpr (R > 0) {
        if (p.rows - row == R) {
            product_tile<R, V>(p, row, vector);
        } else {
            product_last_rows<R - 1, V>(p, row, vector);
        }
    }
}

template <int V>
void product_columns(const ProductArgs& p, int64_t vector) {
    int64_t row = 0;
    for (; row + kTileRows <= p.rows; row += kTileRows) product_tile<kTileRows, V>(p, row, vector);
    product_last_rows<kTileRows - 1, V>(p, row, vector);
}

template <int V>
void product_last_columns(const ProductArgs& p, int64_t vector) {
    if constexpr (V > 0) {
        if (p.vectors - vector == V) {
            product_columns<V>(p, vector);
        } else {
            product_last_columns<V - 1>(p, vector);
        }
    }
}

void product(const ProductArgs& p) {
    int64_t vector = 0;
    for (; vector + kTileVectors <= p.vectors; vector += kTileVectors) product_columns<kTileVectors>(p, vector);
    product_last_columns<kTileVectors - 1>(p, vector);
}
