#include "ops/delta_net.h"

#include MOESAIC_ISA_HEADER

namespace moesaic::MOESAIC_ISA_NAMESPACE {

namespace {

MOESAIC_INLINE int lanes(int64_t left) { return left < 16 ? static_cast<int>(left) : 16; }

MOESAIC_INLINE bool follow_each_other(const int32_t* columns, int n) {
    for (int i = 1; i < n; ++i) {
        if (columns[i] != columns[0] + i) return false;
    }
    return true;
}

MOESAIC_INLINE vf gather(const float* x, const int32_t* columns, int n) {
    float values[16];
    for (int i = 0; i < n; ++i) values[i] = x[columns[i]];
    return load_n(values, n);
}

void convolve(const DeltaNetArgs& a, int64_t sequence, int64_t channel) {
    const int64_t channels = a.channels();
    const int n = lanes(channels - channel), past = static_cast<int>(a.taps) - 1;
    const int32_t* columns = a.conv_columns + channel;
    const float* weight = a.conv_weight + channel;
    float* state = a.conv_state + a.slots[sequence] * past * channels + channel;
    const bool in_order = follow_each_other(columns, n), is_new = a.is_new(sequence);
    vf before[kMaxDeltaTaps - 1];  // oldest first
    for (int i = 0; i < past; ++i) before[i] = is_new ? set1(0.0f) : load_n(state + i * channels, n);
    for (int64_t token = a.starts[sequence]; token < a.starts[sequence + 1]; ++token) {
        const float* x = a.x + token * a.x_stride;
        const vf now = in_order ? load_n(x + columns[0], n) : gather(x, columns, n);
        vf sum = set1(0.0f);
        for (int i = 0; i < past; ++i) sum = fma(load_n(weight + i * channels, n), before[i], sum);
        sum = fma(load_n(weight + past * channels, n), now, sum);
        store_n(a.mixed + token * channels + channel, silu(sum), n);
        for (int i = 0; i + 1 < past; ++i) before[i] = before[i + 1];
        before[past - 1] = now;
    }
    for (int i = 0; i < past; ++i) store_n(state + i * channels, before[i], n);
}

void scale_to_length(float* x, int64_t dim, float length) {
    vf squares = set1(0.0f);
    for (int64_t i = 0; i < dim; i += 16) {
        const vf part = load_n(x + i, lanes(dim - i));
        squares = fma(part, part, squares);
    }
    const vf factor = set1(length / __builtin_sqrtf(reduce_add(squares) + 1e-6f));
    for (int64_t i = 0; i < dim; i += 16) {
        const int n = lanes(dim - i);
        store_n(x + i, mul(load_n(x + i, n), factor), n);
    }
}

void normalize(const DeltaNetArgs& a, int64_t token_begin, int64_t token_end) {
    const float query_length = 1.0f / __builtin_sqrtf(static_cast<float>(a.key_dim));
    for (int64_t token = token_begin; token < token_end; ++token) {
        float* head = a.mixed + token * a.channels();
        for (int64_t h = 0; h < 2 * a.key_heads; ++h, head += a.key_dim) {
            scale_to_length(head, a.key_dim, h < a.key_heads ? query_length : 1.0f);
        }
    }
}

// Columns of a head's state, in memory of their own while tokens go through them: rows of kVectors vectors.
template <int kVectors>
struct StateColumns {
    float values[kMaxDeltaKeyDim * kVectors * 16];

    inline __attribute__((always_inline)) float* at(int64_t row, int i) { return values + (row * kVectors + i) * 16; }

    // delta = beta (v - decay k S), then S = decay S + k delta, and out = q S
    inline __attribute__((always_inline)) void step(const float* q, const float* k, const vf (&v)[kVectors],
                                                    float decay, float beta, int64_t key_dim, vf (&out)[kVectors]) {
        vf even[kVectors], odd[kVectors], delta[kVectors];
        for (int i = 0; i < kVectors; ++i) even[i] = odd[i] = set1(0.0f);
        int64_t row = 0;
        for (; row + 2 <= key_dim; row += 2) {
            const vf k0 = set1(k[row]), k1 = set1(k[row + 1]);
            for (int i = 0; i < kVectors; ++i) even[i] = fma(k0, load(at(row, i)), even[i]);
            for (int i = 0; i < kVectors; ++i) odd[i] = fma(k1, load(at(row + 1, i)), odd[i]);
        }
        if (row < key_dim) {
            for (int i = 0; i < kVectors; ++i) even[i] = fma(set1(k[row]), load(at(row, i)), even[i]);
        }
        const vf keep = set1(decay), write = set1(beta);
        for (int i = 0; i < kVectors; ++i) {
            delta[i] = mul(write, sub(v[i], mul(keep, add(even[i], odd[i]))));
            out[i] = set1(0.0f);
        }
        for (row = 0; row < key_dim; ++row) {
            const vf key = set1(k[row]), query = set1(q[row]);
            for (int i = 0; i < kVectors; ++i) {
                const vf s = fma(key, delta[i], mul(keep, load(at(row, i))));
                store(at(row, i), s);
                out[i] = fma(query, s, out[i]);
            }
        }
    }
};

template <int kVectors>
void recur_columns(const DeltaNetArgs& a, int64_t sequence, int64_t head, int64_t column, int last_lanes) {
    const int64_t key_head = head / (a.heads / a.key_heads), channels = a.channels();
    float* state = a.state + (a.slots[sequence] * a.heads + head) * a.key_dim * a.value_dim + column;
    const int64_t value = 2 * a.key_heads * a.key_dim + head * a.value_dim + column;
    const bool is_new = a.is_new(sequence);
    StateColumns<kVectors> columns;
    auto lanes_of = [&](int i) { return i + 1 < kVectors ? 16 : last_lanes; };
    for (int64_t row = 0; row < a.key_dim; ++row) {
        for (int i = 0; i < kVectors; ++i) {
            const float* from = state + row * a.value_dim + 16 * i;
            store(columns.at(row, i), is_new ? set1(0.0f) : load_n(from, lanes_of(i)));
        }
    }
    for (int64_t token = a.starts[sequence]; token < a.starts[sequence + 1]; ++token) {
        const float* mixed = a.mixed + token * channels;
        const float* gates = a.gates + token * 2 * a.heads + head;
        float* out = a.out + token * a.heads * a.value_dim + head * a.value_dim + column;
        vf v[kVectors], result[kVectors];
        for (int i = 0; i < kVectors; ++i) v[i] = load_n(mixed + value + 16 * i, lanes_of(i));
        columns.step(mixed + key_head * a.key_dim, mixed + (a.key_heads + key_head) * a.key_dim, v, gates[0],
                     gates[a.heads], a.key_dim, result);
        for (int i = 0; i < kVectors; ++i) store_n(out + 16 * i, result[i], lanes_of(i));
    }
    for (int64_t row = 0; row < a.key_dim; ++row) {
        for (int i = 0; i < kVectors; ++i) {
            store_n(state + row * a.value_dim + 16 * i, load(columns.at(row, i)), lanes_of(i));
        }
    }
}

void recur(const DeltaNetArgs& a, int64_t sequence, int64_t head, int64_t column) {
    static_assert(kDeltaColumns == 32);
    const int64_t left = a.value_dim - column;
    if (left > 16) {
        recur_columns<2>(a, sequence, head, column, lanes(left - 16));
    } else {
        recur_columns<1>(a, sequence, head, column, lanes(left));
    }
}

void finish(const DeltaNetArgs& a, int64_t token_begin, int64_t token_end) {
    for (int64_t token = token_begin; token < token_end; ++token) {
        for (int64_t head = 0; head < a.heads; ++head) {
            float* out = a.out + (token * a.heads + head) * a.value_dim;
            const float* gate = a.x + token * a.x_stride + a.gate_columns[head];
            vf squares = set1(0.0f);
            for (int64_t i = 0; i < a.value_dim; i += 16) {
                const vf part = load_n(out + i, lanes(a.value_dim - i));
                squares = fma(part, part, squares);
            }
            const float mean = reduce_add(squares) / static_cast<float>(a.value_dim);
            const vf factor = set1(1.0f / __builtin_sqrtf(mean + a.norm_eps));
            for (int64_t i = 0; i < a.value_dim; i += 16) {
                const int n = lanes(a.value_dim - i);
                const vf normed = mul(mul(load_n(out + i, n), factor), load_n(a.norm_weight + i, n));
                store_n(out + i, mul(normed, silu(load_n(gate + i, n))), n);
            }
        }
    }
}

}  // namespace

const DeltaNetKernels& delta_net_kernels() {
    static constexpr DeltaNetKernels kernels{convolve, normalize, recur, finish};
    return kernels;
}

}  // namespace moesaic::MOESAIC_ISA_NAMESPACE
