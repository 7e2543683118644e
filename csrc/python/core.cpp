// Bindings of the core: instruction sets and threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu.h"
#include "dispatch.h"
#include "python/bindings.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace moesaic {

void bind_core(nb::module_& m) {
    m.def("isas", &usable_isas, "Instruction sets that this processor can run, best first.");
    m.def("active_isa", &active_isa, "The instruction set that kernels run with.");
    m.def("set_isa", &set_isa, nb::arg("name"), "Force an instruction set; ValueError if it cannot run here.");
    m.def(
        "cpu_features",
        [] {
            nb::dict features;
            for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
            return features;
        },
        "Processor features that kernels may use, and whether they are present.");
    m.def("num_threads", &num_threads, "Threads of the pool.");
    m.def("set_num_threads", &set_num_threads, nb::arg("num_threads"), "Replace the pool of threads.");
    m.def("num_usable_cores", &num_usable_cores, "Physical cores that this process may use.");
}

}  // namespace moesaic
