// Bindings of csrc/quantize.
#include "quantize/quantize.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "python/bindings.h"

namespace nb = nanobind;

namespace moesaic {

void bind_quantize(nb::module_& m) {
    m.def("writable_formats", &quantize::writable_types, "ggml numbers of the formats that `quantize` writes.");
    m.def("largest_magnitude", &quantize::largest_magnitude, nb::arg("format"),
          "The largest magnitude of a weight that the format can hold.");
    m.def(
        "quantize",
        [](int format, std::int64_t rows, std::int64_t cols, std::int64_t row_bytes, std::uintptr_t src_ptr,
           std::uintptr_t dst_ptr, std::uintptr_t importance_ptr) {
            return quantize::quantize_rows(format, rows, cols, row_bytes, as_pointer<const float>(src_ptr),
                                           as_pointer<const float>(importance_ptr), as_pointer<std::uint8_t>(dst_ptr));
        },
        nb::arg("format"), nb::arg("rows"), nb::arg("cols"), nb::arg("row_bytes"), nb::arg("src_ptr"),
        nb::arg("dst_ptr"), nb::arg("importance_ptr") = 0, nb::call_guard<ReleaseGil>(),
        "Quantise float32 [rows, cols] into blocks [rows, row_bytes]; importance is float32 [cols] or 0. Returns -1, "
        "or "
        "the first row with a weight that is not finite or too large (dst is then incomplete).");
}

}  // namespace moesaic
