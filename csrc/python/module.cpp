// The extension module moesaic._native.
#include <nanobind/nanobind.h>

#include "python/bindings.h"

NB_MODULE(_native, m) {
    m.doc() = "Kernels of Moesaic: pointers and shapes in, numbers out. Knows neither PyTorch nor files.";
    moesaic::bind_core(m);
    moesaic::bind_quantize(m);
    moesaic::bind_ops(m);
    moesaic::bind_blocks(m);
    moesaic::bind_paged(m);
    moesaic::bind_states(m);
    moesaic::bind_handoff(m);
}
