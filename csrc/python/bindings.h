// The parts of the Python module; only csrc/python knows Python. Arguments named *_ptr are integer addresses that the
// Python side has checked; every binding releases the GIL while it computes.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace moesaic {

void bind_core(nanobind::module_& m);      // instruction sets, threads, formats, packing; calls bind_products
void bind_products(nanobind::module_& m);  // linear maps and experts
void bind_quantize(nanobind::module_& m);  // float rows to blocks
void bind_ops(nanobind::module_& m);       // norms, rope, attention, router, bandwidth
void bind_blocks(nanobind::module_& m);    // halves of a decoder layer in one call each

// An address given by Python as an object of type T.
template <class T>
T* as_pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace moesaic
