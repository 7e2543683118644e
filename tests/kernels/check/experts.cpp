// Routed experts in one call against one token, one expert at a time in double precision.
#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe.h"
#include "moe_ahead.h"
#include "oracle.h"
#include "parts.h"
#include "samples.h"
#include "thread_pool.h"

namespace check {

using moesaic::Activation;
using moesaic::ActivationKind;
using moesaic::FormatInfo;

namespace {

constexpr std::int64_t kExperts = 4;

struct Description {
    const FormatInfo *gate, *up, *down;  // gate null: none
    std::int64_t hidden;
    std::vector<std::int64_t> intermediate;  // of each slice
    Activation activation{ActivationKind::kSilu, 1.702f, 7.0f};
    bool biased = false;
};

// Some intermediate rows of all experts.
struct Slice {
    std::optional<Matrices> gate;
    Matrices up, down;
    std::vector<float> gate_bias, up_bias;  // [experts, intermediate]

    Slice(const Description& d, std::int64_t intermediate, std::uint64_t seed)
        : up(*d.up, intermediate, d.hidden, kExperts, seed), down(*d.down, d.hidden, intermediate, kExperts, seed + 1) {
        if (d.gate != nullptr) gate.emplace(*d.gate, intermediate, d.hidden, kExperts, seed + 2);
        Random random(seed + 3);
        gate_bias = normals(random, kExperts * intermediate);
        up_bias = normals(random, kExperts * intermediate);
    }
};

std::vector<double> project(const Matrices& m, const float* bias, std::int64_t expert, const std::vector<double>& x) {
    std::vector<double> y;
    for (std::int64_t r = expert * m.rows; r < (expert + 1) * m.rows; ++r) {
        y.push_back(dot(&m.values[r * m.cols], x) + (bias == nullptr ? 0.0 : bias[r]));
    }
    return y;
}

// Experts with random weights, as the library and as the oracle see them.
class Layer {
  public:
    explicit Layer(const Description& d) : d_(d) {
        for (std::int64_t size : d.intermediate) slices_.emplace_back(d, size, 21 + 10 * slices_.size());
        Random random(20);
        down_bias_ = normals(random, kExperts * d.hidden);
    }

    moesaic::Experts experts() const {
        moesaic::Experts all{{}, kExperts, d_.hidden, d_.activation};
        for (const Slice& s : slices_) {
            all.slices.push_back({s.gate ? part(*s.gate, s.gate_bias) : moesaic::ExpertMatrices{},
                                  part(s.up, s.up_bias), part(s.down, down_bias_), s.up.rows});
            if (all.slices.size() > 1) all.slices.back().down.bias = nullptr;
        }
        return all;
    }

    // Adds weight * expert(x) to out. The input of down comes from float32 sums, so it may fall to the other side of a
    // step than here: two such steps are added to what is allowed.
    void add(std::int64_t expert, double weight, const float* x, double* out, double* allowed) const {
        for (const Slice& s : slices_) {
            std::vector<double> gate;
            if (s.gate) gate = project(*s.gate, bias(s.gate_bias), expert, seen_by(*d_.gate, x, d_.hidden).values);
            const auto up = project(s.up, bias(s.up_bias), expert, seen_by(*d_.up, x, d_.hidden).values);
            std::vector<float> inner;
            for (std::size_t i = 0; i < up.size(); ++i) {
                inner.push_back(static_cast<float>(activate(d_.activation, s.gate ? &gate[i] : nullptr, up[i])));
            }
            const Seen seen = seen_by(*d_.down, inner.data(), s.down.cols);
            const float* down_bias = &s == &slices_[0] ? bias(down_bias_) : nullptr;
            const auto down = project(s.down, down_bias, expert, seen.values);
            for (std::int64_t r = 0; r < d_.hidden; ++r) {
                out[r] += weight * down[r];
                allowed[r] += 2.0 * std::fabs(weight) * largest_step(s.down, expert, r, seen.steps);
            }
        }
    }

  private:
    const float* bias(const std::vector<float>& values) const { return d_.biased ? values.data() : nullptr; }
    moesaic::ExpertMatrices part(const Matrices& m, const std::vector<float>& values) const {
        return {m.format, m.packed.get(), m.matrix_bytes, bias(values), m.rows};
    }
    static double largest_step(const Matrices& m, std::int64_t expert, std::int64_t r,
                               const std::vector<double>& steps) {
        double step = 0.0;
        for (std::size_t k = 0; k < steps.size(); ++k) {
            step = std::max(step, steps[k] * std::fabs(m.values[(expert * m.rows + r) * m.cols + k]));
        }
        return step;
    }

    Description d_;
    std::vector<Slice> slices_;
    std::vector<float> down_bias_;
};

// Ids of experts: some outside the range, some twice for the same token.
struct Choice {
    std::int64_t top_k;
    std::vector<std::int64_t> experts;
    std::vector<float> weights;

    Choice(std::int64_t num_tokens, std::int64_t k, Random& random) : top_k(k) {
        for (std::int64_t i = 0; i < num_tokens * k; ++i) {
            experts.push_back(random.below(kExperts + 2) - 1);
            weights.push_back(static_cast<float>(random.uniform()));
        }
        experts[0] = kExperts - 1;
    }
};

void check_layer(Report& report, const Description& d, std::int64_t num_tokens, std::int64_t top_k) {
    const Layer layer(d);
    Random random(25);
    const std::int64_t x_stride = d.hidden + 5;
    const std::vector<float> x = activations(random, num_tokens, x_stride);
    const Choice choice(num_tokens, top_k, random);
    std::vector<float> out(num_tokens * d.hidden);
    moesaic::moe_forward(layer.experts(), {choice.experts.data(), choice.weights.data(), top_k}, x.data(), x_stride,
                         num_tokens, out.data());
    std::vector<double> expected(out.size()), allowed(out.size());
    for (std::int64_t i = 0; i < num_tokens * top_k; ++i) {
        const std::int64_t e = choice.experts[i], t = i / top_k;
        if (e < 0 || e >= kExperts) continue;
        layer.add(e, choice.weights[i], &x[t * x_stride], &expected[t * d.hidden], &allowed[t * d.hidden]);
    }
    const std::string name =
        text("experts ", d.gate == nullptr ? "no gate" : d.gate->name, ", ", d.up->name, ", ", d.down->name, ", ",
             num_tokens, " tokens, activation ", static_cast<int>(d.activation.kind), d.biased ? ", biases" : "", ", ",
             d.intermediate.size(), " slices");
    report.expect_close(out, expected, kFloat32Sums, name, allowed);
    // Experts that were read ahead, wholly or until somebody else's number came, come first: the same to the bit.
    for (const std::int64_t number : {0, 1}) {
        const std::int64_t word = 0, wanted[] = {kExperts - 1, 0, kExperts, 1};
        int calls = 0;
        const moesaic::Beside beside = [&] { ++calls; };
        const auto ready = moesaic::read_experts_ahead(layer.experts(), wanted, {&word, number}, &beside);
        report.expect(calls == 1 && ready == std::vector<std::int64_t>{kExperts - 1, 0}, name + ", read ahead");
        std::vector<float> again(out.size());
        moesaic::moe_forward(layer.experts(), {choice.experts.data(), choice.weights.data(), top_k}, x.data(), x_stride,
                             num_tokens, again.data(), nullptr, ready);
        report.expect(again == out, name + ", some read ahead");
    }
}

const FormatInfo& format_named(const char* name) {
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        if (std::string(moesaic::format_at(i).name) == name) return moesaic::format_at(i);
    }
    throw std::runtime_error(text("no format ", name));
}

// Every format in every role, beside two others.
void check_mixed_formats(Report& report) {
    std::vector<const FormatInfo*> all;
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        if (fits(moesaic::format_at(i), 256)) all.push_back(&moesaic::format_at(i));
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
        const FormatInfo& up = *all[(i + 3) % all.size()];
        const FormatInfo& down = *all[(i + 7) % all.size()];
        const Description d{i % 4 == 3 ? nullptr : all[i], &up,       &down, 256, {256},
                            {ActivationKind::kSilu, 0, 0}, i % 2 == 1};
        for (std::int64_t num_tokens : {1, 6}) check_layer(report, d, num_tokens, 2);
    }
}

void check_activations(Report& report) {
    const FormatInfo &f32 = format_named("F32"), &f16 = format_named("F16"), &q8 = format_named("Q8_0");
    for (int kind = 0; kind <= static_cast<int>(ActivationKind::kSwigluOai); ++kind) {
        const Activation activation{static_cast<ActivationKind>(kind), 1.702f, 7.0f};
        for (bool gated : {true, false}) {
            if (!gated && activation.kind == ActivationKind::kSwigluOai) continue;
            check_layer(report, {gated ? &f32 : nullptr, &f16, &f32, 19, {37}, activation, true}, 3, 3);
            check_layer(report, {gated ? &q8 : nullptr, &q8, &q8, 96, {160}, activation, true}, 3, 3);
        }
    }
}

// Experts cut over memory nodes, of which the computer may have fewer.
void check_nodes(Report& report) {
    const FormatInfo &q4 = format_named("Q4_0"), &q8 = format_named("Q8_0"), &f16 = format_named("F16");
    for (int nodes : {2, 3}) {
        moesaic::set_num_nodes(nodes);
        std::vector<std::int64_t> sizes = {96, 64};
        if (nodes == 3) sizes.push_back(32);
        for (std::int64_t num_tokens : {1, 5}) {
            check_layer(report, {&q4, &q8, &q4, 96, sizes, {ActivationKind::kSilu, 0, 0}, true}, num_tokens, 2);
            check_layer(report, {nullptr, &f16, &q8, 64, sizes, {ActivationKind::kGelu, 0, 0}, true}, num_tokens, 2);
        }
    }
    moesaic::set_num_nodes(0);
}

}  // namespace

void check_experts(Report& report) {
    check_mixed_formats(report);
    check_activations(report);
    check_nodes(report);
    // Many tokens that share experts.
    check_layer(report, {&format_named("Q4_K"), &format_named("Q5_0"), &format_named("Q8_0"), 256, {288}}, 40, 3);
}

}  // namespace check
