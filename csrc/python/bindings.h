// The parts of the Python module; only csrc/python knows Python. Arguments named *_ptr are integer addresses that the
// Python side has checked; every binding releases the GIL while it computes (ReleaseGil).
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace moesaic {

void bind_core(nanobind::module_& m);      // instruction sets, threads, formats, packing; calls bind_products
void bind_products(nanobind::module_& m);  // linear maps and experts
void bind_quantize(nanobind::module_& m);  // float rows to blocks
void bind_ops(nanobind::module_& m);       // norms, rope, attention, router, bandwidth
void bind_blocks(nanobind::module_& m);    // halves of a decoder layer in one call each
void bind_paged(nanobind::module_& m);     // attention and decoder layers on a cache in pages
void bind_states(nanobind::module_& m);    // linear attention on recurrent states
void bind_handoff(nanobind::module_& m);   // experts for a step on a GPU

// Nanoseconds that calls have spent computing, of all threads of Python together.
inline std::atomic<std::int64_t> native_nanoseconds{0};

// While it lives the GIL is released and the time counts as native.
class ReleaseGil {
  public:
    ReleaseGil() : start_(std::chrono::steady_clock::now()) {}
    ~ReleaseGil() {
        const auto elapsed = std::chrono::steady_clock::now() - start_;
        native_nanoseconds.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count(),
                                     std::memory_order_relaxed);
    }
    ReleaseGil(const ReleaseGil&) = delete;
    ReleaseGil& operator=(const ReleaseGil&) = delete;

  private:
    nanobind::gil_scoped_release release_;
    std::chrono::steady_clock::time_point start_;
};

// An address given by Python as an object of type T.
template <class T>
T* as_pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace moesaic
