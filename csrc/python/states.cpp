// Bindings of what runs on recurrent states in slots. The Python side has checked shapes and types; what starts and
// slots say is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "ops/delta_net.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Address = std::uintptr_t;
using Columns = std::tuple<Address, Address, Address, Address>;
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using Weights = std::tuple<Address, Address, Address, Address, float>;
using States = std::tuple<Address, Address, std::int64_t>;
using Step = std::tuple<std::int64_t, std::int64_t, Address, Address, Address>;

void set_constants(DeltaNetArgs& a, const Columns& columns, const Sizes& sizes, const Weights& weights) {
    a.conv_columns = as_pointer<const std::int32_t>(std::get<0>(columns));
    a.gate_columns = as_pointer<const std::int32_t>(std::get<1>(columns));
    a.beta_columns = as_pointer<const std::int32_t>(std::get<2>(columns));
    a.decay_columns = as_pointer<const std::int32_t>(std::get<3>(columns));
    std::tie(a.key_heads, a.heads, a.key_dim, a.value_dim, a.taps) = sizes;
    a.conv_weight = as_pointer<const float>(std::get<0>(weights));
    a.rate = as_pointer<const float>(std::get<1>(weights));
    a.step_bias = as_pointer<const float>(std::get<2>(weights));
    a.norm_weight = as_pointer<const float>(std::get<3>(weights));
    a.norm_eps = std::get<4>(weights);
}

}  // namespace

void bind_states(nb::module_& m) {
    m.attr("MAX_DELTA_KEY_DIM") = kMaxDeltaKeyDim;
    m.attr("MAX_DELTA_TAPS") = kMaxDeltaTaps;
    m.def(
        "delta_net",
        [](Address x_ptr, std::int64_t x_stride, const Columns& columns, const Sizes& sizes, const Weights& weights,
           const States& states, const Step& step, Address mixed_ptr, Address gates_ptr, Address out_ptr) {
            DeltaNetArgs a{};
            set_constants(a, columns, sizes, weights);
            a.x = as_pointer<const float>(x_ptr);
            a.x_stride = x_stride;
            a.conv_state = as_pointer<float>(std::get<0>(states));
            a.state = as_pointer<float>(std::get<1>(states));
            a.num_tokens = std::get<0>(step);
            a.num_sequences = std::get<1>(step);
            a.starts = as_pointer<const std::int32_t>(std::get<2>(step));
            a.slots = as_pointer<const std::int64_t>(std::get<3>(step));
            a.positions = as_pointer<const std::int64_t>(std::get<4>(step));
            a.mixed = as_pointer<float>(mixed_ptr);
            a.gates = as_pointer<float>(gates_ptr);
            a.out = as_pointer<float>(out_ptr);
            check_delta_net(a, std::get<2>(states));
            ReleaseGil release;
            delta_net(a);
        },
        "x_ptr"_a, "x_stride"_a, "columns"_a, "sizes"_a, "weights"_a, "states"_a, "step"_a, "mixed_ptr"_a,
        "gates_ptr"_a, "out_ptr"_a,
        "Gated delta rule between a layer's projections and its output matrix. columns: (conv, gate, beta, decay); "
        "sizes: (key heads, heads, key_dim, value_dim, taps); weights: (conv, rate, step_bias, norm, eps); states: "
        "(conv, recurrent, slots); step: (tokens, sequences, starts, slots, positions). ValueError if starts or slots "
        "do not go together.");
}

}  // namespace moesaic
