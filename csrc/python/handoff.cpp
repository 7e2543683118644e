// Bindings of csrc/handoff.h.
#include "handoff.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

// Layers of a model and the mailbox through which they are asked for; the experts are kept alive by the Python side.
struct ExpertServer {
    Mailbox mailbox;
    std::vector<ServedLayer> layers;
    Deferral deferral;
};

Int serve(ExpertServer& server, Int first_layer, Int num_layers, Int first_request, Int num_tokens,
          double timeout_seconds, Address times_ptr) {
    const auto all = static_cast<Int>(server.layers.size());
    if (first_layer < 0 || num_layers < 0 || first_layer + num_layers > all) throw nb::value_error("no such layers");
    ReleaseGil release;
    const auto count = static_cast<std::size_t>(num_layers);
    const std::span<const ServedLayer> layers{server.layers.data() + first_layer, count};
    std::span<ServedTimes> times;
    if (times_ptr != 0) times = {as_pointer<ServedTimes>(times_ptr), count};
    return serve_experts(server.mailbox, layers, first_request, num_tokens, timeout_seconds, times, server.deferral);
}

void defer(ExpertServer& server, Int count) {
    if (count < 0 || count > server.mailbox.top_k) throw nb::value_error("a token has not so many experts");
    for (ServedLayer& layer : server.layers) layer.num_deferred = count;
    if (!server.layers.empty()) server.layers.back().num_deferred = 0;
    server.deferral.forget();
}

}  // namespace

void bind_handoff(nb::module_& m) {
    m.attr("GAVE_UP") = kGaveUp;
    nb::class_<ExpertServer>(m, "ExpertServer", "Answers a GPU's requests for routed experts; see csrc/handoff.h.")
        .def(
            "__init__",
            [](ExpertServer* self, Address requested_ptr, Address answered_ptr, Address hidden_ptr, Address chosen_ptr,
               Address experts_ptr, Address weights_ptr, Address output_ptr, Int max_tokens, Int hidden_size, Int top_k,
               const std::vector<std::tuple<const Experts*, Address>>& layers) {
                new (self) ExpertServer{{as_pointer<const Int>(requested_ptr), as_pointer<Int>(answered_ptr),
                                         as_pointer<const float>(hidden_ptr), as_pointer<const Int>(chosen_ptr),
                                         as_pointer<const Int>(experts_ptr), as_pointer<const float>(weights_ptr),
                                         as_pointer<float>(output_ptr), max_tokens, hidden_size, top_k},
                                        {},
                                        Deferral(max_tokens, hidden_size, top_k)};
                for (const auto& [experts, uses] : layers) {
                    self->layers.push_back({experts, as_pointer<std::uint32_t>(uses), 0});
                }
            },
            "requested_ptr"_a, "answered_ptr"_a, "hidden_ptr"_a, "chosen_ptr"_a, "experts_ptr"_a, "weights_ptr"_a,
            "output_ptr"_a, "max_tokens"_a, "hidden_size"_a, "top_k"_a, "layers"_a,
            "layers: (experts, uses_ptr) of each; uses_ptr is uint32 [num_experts] to count in, or 0.")
        .def("serve", &serve, "first_layer"_a, "num_layers"_a, "first_request"_a, "num_tokens"_a, "timeout_seconds"_a,
             "times_ptr"_a = 0,
             "Answer one request for each of these layers; how many came in time. times_ptr: int64 [num_layers, 3], "
             "nanoseconds of the monotonic clock when a request was seen, answered, and all of it computed; or 0.")
        .def("defer", &defer, "count"_a,
             "From the next step on, the `count` experts of each token with the lowest weights come with the next "
             "layer's answer, but for the last layer's.")
        .def(
            "forget", [](ExpertServer& self) { self.deferral.forget(); },
            "What the last layer that was served has put off will not be wanted.");
}

}  // namespace moesaic
