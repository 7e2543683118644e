// Bindings of the core: instruction sets, threads, formats, packing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu.h"
#include "dispatch.h"
#include "kernels/independent_rows.h"
#include "numa.h"
#include "packing.h"
#include "python/bindings.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Release = nb::call_guard<ReleaseGil>;

void bind_machine(nb::module_& m) {
    m.def("isas", &usable_isas, "Instruction sets that this processor can run, best first.");
    m.def("left_out_isas", &left_out_isas, "Those that it could run, too, but that this build leaves out, best first.");
    m.def("active_isa", &active_isa, "The instruction set that kernels run with.");
    m.def("set_isa", &set_isa, "name"_a, "Force an instruction set; ValueError if it cannot run here.");
    m.def(
        "cpu_features",
        [] {
            nb::dict features;
            for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
            return features;
        },
        "Processor features that kernels may use, and whether they are present.");
    m.def("num_threads", &num_threads, "Threads of the pool.");
    m.def("set_num_threads", &set_num_threads, "num_threads"_a, Release(), "Replace the pool of threads.");
    m.def(
        "set_independent_rows", &set_independent_rows, "on"_a,
        "Whether products that this thread asks for give a token the same whatever the number of tokens; returns what "
        "it was.");
    m.def("set_pinning", &set_pinning, "pin"_a, Release(), "Whether threads are confined to a core each.");
    m.def(
        "numa_nodes",
        [] {
            nb::list nodes;
            for (const NumaNode& node : numa_nodes()) {
                std::vector<int> cpus;
                for (const auto& core : node.cores) cpus.insert(cpus.end(), core.begin(), core.end());
                nodes.append(nb::make_tuple(node.id, cpus));
            }
            return nodes;
        },
        "Memory nodes that threads and experts are divided over: (the system's number, CPUs); number -1: pretended.");
    m.def("set_num_nodes", &set_num_nodes, "count"_a, Release(),
          "Pretend that the cores belong to so many nodes; 0: the nodes of the system.");
    m.def(
        "place_memory",
        [](std::uintptr_t ptr, std::size_t num_bytes, int node) {
            place_memory(as_pointer<void>(ptr), num_bytes, node);
        },
        "ptr"_a, "num_bytes"_a, "node"_a, Release(),
        "Let untouched memory lie on a node of numa_nodes(), by its position there; -1: spread over all.");
    m.def("num_usable_cores", &num_usable_cores, "Physical cores that this process may use.");
    m.def(
        "native_seconds", [] { return 1e-9 * static_cast<double>(native_nanoseconds.load()); },
        "Seconds that calls of this module have spent computing since it was loaded.");
}

nb::list formats() {
    nb::list rows;
    for (int i = 0; i < num_formats(); ++i) {
        const FormatInfo& format = format_at(i);
        nb::dict row;
        row["name"] = format.name;
        row["ggml_type"] = format.ggml_type;
        row["block_size"] = format.block;
        row["block_bytes"] = format.block_bytes;
        row["is_quantized"] = format.block > 1;
        row["rounds_activations"] = format.quantized;
        row["recodes"] = format.recodes < 0 ? nb::none() : nb::object(nb::int_(format.recodes));
        rows.append(row);
    }
    return rows;
}

void bind_packing(nb::module_& m) {
    m.def("formats", &formats, "The weight formats, as dicts of the fields of moesaic.quant.WeightFormat.");
    m.def(
        "packed_nbytes",
        [](int format, std::int64_t rows, std::int64_t cols) {
            check_matrix(format_info(format), rows, cols);
            return format_info(format).packed_bytes(rows, cols);
        },
        "format"_a, "rows"_a, "cols"_a, "Bytes of a packed matrix: rows are padded to a multiple of 16.");
    m.def(
        "pack",
        [](int format, std::int64_t rows, std::int64_t cols, std::uintptr_t src_ptr, std::int64_t src_stride,
           std::uintptr_t dst_ptr, int source) {
            pack_matrix(format_info(format), rows, cols, as_pointer<const std::uint8_t>(src_ptr), src_stride,
                        as_pointer<std::uint8_t>(dst_ptr), format_info(source));
        },
        "format"_a, "rows"_a, "cols"_a, "src_ptr"_a, "src_stride"_a, "dst_ptr"_a, "source"_a, Release(),
        "Rows of blocks of the format `source`, src_stride bytes apart, into a packed matrix. The source is the format "
        "itself, or the one that it recodes.");
    m.def(
        "unpack",
        [](int format, std::int64_t rows, std::int64_t cols, std::uintptr_t src_ptr, std::uintptr_t dst_ptr) {
            unpack_matrix(format_info(format), rows, cols, as_pointer<const std::uint8_t>(src_ptr),
                          as_pointer<std::uint8_t>(dst_ptr));
        },
        "format"_a, "rows"_a, "cols"_a, "src_ptr"_a, "dst_ptr"_a, Release(), "The inverse of pack, bit by bit.");
    m.def(
        "dequantize",
        [](int format, std::int64_t rows, std::int64_t cols, std::uintptr_t src_ptr, std::uintptr_t dst_ptr) {
            dequantize_matrix(format_info(format), rows, cols, as_pointer<const std::uint8_t>(src_ptr),
                              as_pointer<float>(dst_ptr));
        },
        "format"_a, "rows"_a, "cols"_a, "src_ptr"_a, "dst_ptr"_a, Release(),
        "Contiguous rows of blocks (not packed) to float32 [rows, cols].");
    m.def(
        "grid_places",
        [](int format) {
            const FormatInfo& info = format_info(format);
            return std::vector<int>(info.grid_places, info.grid_places + info.num_grid_places);
        },
        "format"_a,
        "By number in packed matrices, the place of an entry of the codebook in the published grid; empty if the "
        "same.");
    m.def(
        "gather_rows",
        [](int format, std::int64_t rows, std::int64_t cols, std::uintptr_t packed_ptr, std::uintptr_t ids_ptr,
           std::int64_t num_ids, std::uintptr_t dst_ptr) {
            gather_rows(format_info(format), rows, cols, as_pointer<const std::uint8_t>(packed_ptr),
                        as_pointer<const std::int64_t>(ids_ptr), num_ids, as_pointer<float>(dst_ptr));
        },
        "format"_a, "rows"_a, "cols"_a, "packed_ptr"_a, "ids_ptr"_a, "num_ids"_a, "dst_ptr"_a, Release(),
        "Rows of a packed matrix as float32 [num_ids, cols]; IndexError for an id outside it.");
}

}  // namespace

void bind_core(nb::module_& m) {
    bind_machine(m);
    bind_packing(m);
    bind_products(m);
}

}  // namespace moesaic
