// Linear attention on recurrent states, token by token in double precision.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/delta_net.h"
#include "oracle.h"
#include "parts.h"
#include "samples.h"

namespace check {

namespace {

constexpr float kEps = 1e-5f;
constexpr std::int64_t kSlots = 3;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// A layer with sizes as given, its columns in order or backwards, and two sequences: one goes on, one is new.
struct DeltaCase {
    std::int64_t key_heads, heads, key_dim, value_dim, taps;
    bool in_order;
    std::vector<std::int32_t> starts{0, 5, 7};
    std::vector<std::int64_t> slots{2, 0}, positions{9, 10, 11, 12, 13, 0, 1};

    std::int64_t channels() const { return 2 * key_heads * key_dim + heads * value_dim; }
    std::int64_t width() const { return channels() + heads * value_dim + 2 * heads; }
    std::int64_t state_size() const { return heads * key_dim * value_dim; }
    std::int64_t conv_size() const { return (taps - 1) * channels(); }
};

struct Layer {
    explicit Layer(const DeltaCase& c, Random& random)
        : x(normals(random, 7 * c.width())),
          weight(normals(random, c.taps * c.channels())),
          rate(normals(random, c.heads)),
          bias(normals(random, c.heads)),
          norm(normals(random, c.value_dim)),
          conv_state(normals(random, kSlots * c.conv_size())),
          state(normals(random, kSlots * c.state_size())),
          conv(c.channels()),
          gate(c.heads),
          beta(c.heads),
          decay(c.heads) {
        for (float& value : rate) value = std::exp(value);
        std::iota(conv.begin(), conv.end(), 0);
        if (!c.in_order) std::reverse(conv.begin(), conv.end());
        for (std::int64_t h = 0; h < c.heads; ++h) {
            gate[h] = static_cast<std::int32_t>(c.channels() + h * c.value_dim);
            beta[h] = static_cast<std::int32_t>(c.channels() + c.heads * c.value_dim + h);
            decay[h] = static_cast<std::int32_t>(beta[h] + c.heads);
        }
    }

    std::vector<float> x, weight, rate, bias, norm, conv_state, state;
    std::vector<std::int32_t> conv, gate, beta, decay;
};

// Outputs of one sequence, whose states are brought up to date.
void go_through(const DeltaCase& c, const Layer& layer, std::int64_t sequence, std::vector<double>& past,
                std::vector<double>& state, std::vector<double>& out) {
    const std::int64_t channels = c.channels();
    for (std::int64_t token = c.starts[sequence]; token < c.starts[sequence + 1]; ++token) {
        const float* x = &layer.x[token * c.width()];
        for (std::int64_t i = 0; i < channels; ++i) past.push_back(x[layer.conv[i]]);
        std::vector<double> mixed(channels);
        for (std::int64_t i = 0; i < channels; ++i) {
            for (std::int64_t t = 0; t < c.taps; ++t)
                mixed[i] += layer.weight[t * channels + i] * past[t * channels + i];
            mixed[i] *= sigmoid(mixed[i]);
        }
        past.erase(past.begin(), past.begin() + channels);
        for (std::int64_t h = 0; h < 2 * c.key_heads; ++h) {
            double* head = &mixed[h * c.key_dim];
            const double size = std::sqrt(std::inner_product(head, head + c.key_dim, head, 1e-6));
            const double length = h < c.key_heads ? std::sqrt(static_cast<double>(c.key_dim)) : 1.0;
            for (std::int64_t i = 0; i < c.key_dim; ++i) head[i] /= size * length;
        }
        for (std::int64_t h = 0; h < c.heads; ++h) {
            const double* q = &mixed[h / (c.heads / c.key_heads) * c.key_dim];
            const double* k = q + c.key_heads * c.key_dim;
            const double* v = &mixed[2 * c.key_heads * c.key_dim + h * c.value_dim];
            const double step = std::log1p(std::exp(static_cast<double>(x[layer.decay[h]]) + layer.bias[h]));
            const double decay = std::exp(-layer.rate[h] * step), beta = sigmoid(x[layer.beta[h]]);
            std::vector<double> row(c.value_dim);
            double squares = 0.0;
            for (std::int64_t j = 0; j < c.value_dim; ++j) {
                double* s = &state[h * c.key_dim * c.value_dim + j];
                double seen = 0.0;
                for (std::int64_t i = 0; i < c.key_dim; ++i) seen += k[i] * (s[i * c.value_dim] *= decay);
                for (std::int64_t i = 0; i < c.key_dim; ++i) {
                    s[i * c.value_dim] += k[i] * beta * (v[j] - seen);
                    row[j] += q[i] * s[i * c.value_dim];
                }
                squares += row[j] * row[j];
            }
            const double size = std::sqrt(squares / static_cast<double>(c.value_dim) + kEps);
            for (std::int64_t j = 0; j < c.value_dim; ++j) {
                const double gate = x[layer.gate[h] + j];
                out.push_back(row[j] / size * layer.norm[j] * gate * sigmoid(gate));
            }
        }
    }
}

void check_delta_net(Report& report, const DeltaCase& c) {
    Random random(71);
    Layer layer(c, random);
    std::vector<double> out, conv(layer.conv_state.begin(), layer.conv_state.end());
    std::vector<double> states(layer.state.begin(), layer.state.end());
    for (std::int64_t s = 0; s < 2; ++s) {
        const std::int64_t slot = c.slots[s];
        const auto first = conv.begin() + slot * c.conv_size();
        const auto head = states.begin() + slot * c.state_size();
        std::vector<double> past(first, first + c.conv_size()), state(head, head + c.state_size());
        if (s == 1) {
            std::fill(past.begin(), past.end(), 0.0);
            std::fill(state.begin(), state.end(), 0.0);
        }
        go_through(c, layer, s, past, state, out);
        std::copy(past.begin(), past.end(), first);
        std::copy(state.begin(), state.end(), head);
    }
    std::vector<float> mixed(7 * c.channels()), gates(14 * c.heads), result(out.size());
    const moesaic::DeltaNetArgs a{7,
                                  2,
                                  c.starts.data(),
                                  c.slots.data(),
                                  c.positions.data(),
                                  layer.x.data(),
                                  c.width(),
                                  layer.conv.data(),
                                  layer.gate.data(),
                                  layer.beta.data(),
                                  layer.decay.data(),
                                  c.key_heads,
                                  c.heads,
                                  c.key_dim,
                                  c.value_dim,
                                  layer.weight.data(),
                                  c.taps,
                                  layer.rate.data(),
                                  layer.bias.data(),
                                  layer.norm.data(),
                                  kEps,
                                  layer.conv_state.data(),
                                  layer.state.data(),
                                  mixed.data(),
                                  gates.data(),
                                  result.data()};
    moesaic::check_delta_net(a, kSlots);
    moesaic::delta_net(a);
    const std::string name = text("delta_net, heads of ", c.key_dim, " x ", c.value_dim);
    report.expect_close(result, out, kFloat32Sums, name);
    report.expect_close(layer.state, states, kFloat32Sums, "states of " + name);
    report.expect_close(layer.conv_state, conv, kFloat32Sums, "inputs of " + name);
}

}  // namespace

void check_states(Report& report) {
    check_delta_net(report, {2, 6, 13, 20, 4, false});
    check_delta_net(report, {1, 2, 32, 48, 2, true});
    check_delta_net(report, {2, 4, 128, 128, 4, true});
}

}  // namespace check
