// Bindings of csrc/handoff.h and csrc/uploads.h.
#include "handoff.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
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
    Forecast forecast;
    ForecastCounts counts;
};

// Layers whose experts can be brought to a device.
struct ExpertUploads {
    Uploads uploads;
    std::vector<UploadedLayer> layers;
};

// Where the device is the CPU there is no queue: a copy is done when it is asked for.
int copy_now(std::uint64_t to, const void* from, std::size_t num_bytes, void*) {
    std::memcpy(as_pointer<void>(to), from, num_bytes);
    return 0;
}

using MatrixPlace = std::tuple<Address, Int, Int>;  // of the first matrix; bytes of one; offset in a slot

UploadedMatrices matrices_at(const MatrixPlace& place) {
    return {as_pointer<const std::uint8_t>(std::get<0>(place)), std::get<1>(place), std::get<2>(place)};
}

ExpertUploads make_uploads(Address copy, Address queue, std::uint64_t arena, std::uint64_t slots, std::uint64_t arrived,
                           Int slot_bytes, Int num_slots, Int max_tokens, Int top_k,
                           const std::vector<std::tuple<MatrixPlace, MatrixPlace, MatrixPlace>>& layers,
                           Address records, Int record_bytes) {
    const Landing landing{arena, slots, arrived, arrived + sizeof(Int), slot_bytes, num_slots, max_tokens, top_k};
    const CopyQueue copies{as_pointer<int(std::uint64_t, const void*, std::size_t, void*)>(copy),
                           as_pointer<void>(queue)};
    ExpertUploads made{Uploads(copies, landing), {}};
    for (const auto& [gate, up, down] : layers) {
        const UploadRecord record{as_pointer<Int>(records), as_pointer<std::int32_t>(records + sizeof(Int))};
        made.layers.push_back({matrices_at(gate), matrices_at(up), matrices_at(down), record});
        records += static_cast<Address>(record_bytes);
    }
    return made;
}

Int serve(ExpertServer& server, Int first_layer, Int num_layers, Int first_request, Int num_tokens,
          double timeout_seconds, Address times_ptr, ExpertUploads* uploads) {
    const auto all = static_cast<Int>(server.layers.size());
    if (first_layer < 0 || num_layers < 0 || first_layer + num_layers > all) throw nb::value_error("no such layers");
    ReleaseGil release;
    const auto count = static_cast<std::size_t>(num_layers);
    if (uploads != nullptr && uploads->layers.size() != server.layers.size()) throw nb::value_error("other layers");
    for (std::size_t i = 0; uploads != nullptr && i < server.layers.size(); ++i) {
        server.layers[i].uploaded = &uploads->layers[i];
    }
    const std::span<const ServedLayer> layers{server.layers.data() + first_layer, count};
    std::span<ServedTimes> times;
    if (times_ptr != 0) times = {as_pointer<ServedTimes>(times_ptr), count};
    return serve_experts(server.mailbox, layers, first_request, num_tokens, timeout_seconds, times, server.deferral,
                         uploads == nullptr ? nullptr : &uploads->uploads, server.forecast, server.counts);
}

void defer(ExpertServer& server, Int count) {
    if (count < 0 || count > server.mailbox.top_k) throw nb::value_error("a token has not so many experts");
    for (ServedLayer& layer : server.layers) layer.num_deferred = count;
    if (!server.layers.empty()) server.layers.back().num_deferred = 0;
    server.deferral.forget();
}

void bind_uploads(nb::module_& m) {
    m.def(
        "copy_now_ptr", [] { return reinterpret_cast<Address>(&copy_now); },
        "Address of a copy_ptr (see ExpertUploads) for memory of the CPU: a copy is done when it is asked for.");
    nb::exception<CopyRefused>(m, "CopyRefused");
    nb::class_<ExpertUploads>(m, "ExpertUploads", "Brings routed experts to a device; see csrc/uploads.h.")
        .def(
            "__init__",
            [](ExpertUploads* self, Address copy_ptr, Address queue, std::uint64_t arena, std::uint64_t slots,
               std::uint64_t arrived, Int slot_bytes, Int num_slots, Int max_tokens, Int top_k,
               const std::vector<std::tuple<MatrixPlace, MatrixPlace, MatrixPlace>>& layers, Address records_ptr,
               Int record_bytes) {
                new (self) ExpertUploads(make_uploads(copy_ptr, queue, arena, slots, arrived, slot_bytes, num_slots,
                                                      max_tokens, top_k, layers, records_ptr, record_bytes));
            },
            "copy_ptr"_a, "queue"_a, "arena"_a, "slots"_a, "arrived"_a, "slot_bytes"_a, "num_slots"_a, "max_tokens"_a,
            "top_k"_a, "layers"_a, "records_ptr"_a, "record_bytes"_a,
            "copy_ptr: int (uint64 to, const void* from, size_t num_bytes, void* queue), 0 if it took note of the "
            "copy. arena, slots, arrived: addresses of the device. layers: (address, bytes of a matrix, offset in a "
            "slot) of gate, up and down of each; records_ptr: record_bytes for each layer: int64, and int32 "
            "[max_tokens, top_k].")
        .def(
            "set_numbers",
            [](ExpertUploads& self, std::vector<std::int32_t> numbers) {
                self.uploads.set_numbers(std::move(numbers));
            },
            "numbers"_a, "How many experts are brought if 0, 1, ... distinct ones are to be computed.")
        .def(
            "bring",
            [](const ExpertUploads& self, Int layer, const std::vector<Int>& experts) {
                self.uploads.bring(self.layers.at(static_cast<std::size_t>(layer)), experts);
            },
            "layer"_a, "experts"_a, "Put experts of a layer into the queue, into the first slots.")
        .def_prop_ro("num_missing", [](const ExpertUploads& self) { return self.uploads.num_missing(); })
        .def_prop_ro("num_brought", [](const ExpertUploads& self) { return self.uploads.num_brought(); })
        .def_prop_ro("num_ahead", [](const ExpertUploads& self) { return self.uploads.num_ahead(); })
        .def_prop_ro("num_asked", [](const ExpertUploads& self) { return self.uploads.num_asked(); });
}

}  // namespace

void bind_handoff(nb::module_& m) {
    m.attr("GAVE_UP") = kGaveUp;
    bind_uploads(m);
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
                                        Deferral(max_tokens, hidden_size, top_k),
                                        {},
                                        {}};
                for (const auto& [experts, uses] : layers) {
                    self->layers.push_back({experts, as_pointer<std::uint32_t>(uses), 0});
                }
            },
            "requested_ptr"_a, "answered_ptr"_a, "hidden_ptr"_a, "chosen_ptr"_a, "experts_ptr"_a, "weights_ptr"_a,
            "output_ptr"_a, "max_tokens"_a, "hidden_size"_a, "top_k"_a, "layers"_a,
            "layers: (experts, uses_ptr) of each; uses_ptr is uint32 [num_experts] to count in, or 0.")
        .def("serve", &serve, "first_layer"_a, "num_layers"_a, "first_request"_a, "num_tokens"_a, "timeout_seconds"_a,
             "times_ptr"_a = 0, "uploads"_a.none() = nb::none(),
             "Answer one request for each of these layers; how many came in time. times_ptr: int64 [num_layers, 3], "
             "nanoseconds of the monotonic clock when a request was seen, answered, and all of it computed; or 0. "
             "uploads: what brings some of the experts to the device, of the same layers; or None.")
        .def("defer", &defer, "count"_a,
             "From the next step on, the `count` experts of each token with the lowest weights come with the next "
             "layer's answer, but for the last layer's.")
        .def(
            "set_forecast",
            [](ExpertServer& self, Address foretold_ptr, Address experts_ptr) {
                self.forecast = {as_pointer<const Int>(foretold_ptr), as_pointer<const Int>(experts_ptr)};
            },
            "foretold_ptr"_a, "experts_ptr"_a,
            "Where requests are foretold: int64, the number of one, and int64 [max_tokens, top_k]; 0: nowhere.")
        .def_prop_ro("num_read", [](const ExpertServer& self) { return self.counts.read; })
        .def_prop_ro("num_asked", [](const ExpertServer& self) { return self.counts.asked; })
        .def(
            "forget", [](ExpertServer& self) { self.deferral.forget(); },
            "What the last layer that was served has put off will not be wanted.");
}

}  // namespace moesaic
