// Bindings of csrc/ops.
#include <nanobind/nanobind.h>

#include "python/bindings.h"

namespace moesaic {

void bind_ops(nanobind::module_&) {}

}  // namespace moesaic
