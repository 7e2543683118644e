// The parts of kernel_check. Each compares what the library computes on the active instruction set with an oracle.
#pragma once

#include "report.h"

namespace check {

// Bytes, not arithmetic: the same code on every instruction set.
void check_packing(Report& report);
void check_quantisers(Report& report);

void check_linear(Report& report);
void check_heads(Report& report);
void check_experts(Report& report);
void check_rows(Report& report);
void check_routing(Report& report);
void check_attention(Report& report);
void check_states(Report& report);
// Several callers at once, errors inside a task, a changing number of threads.
void check_threads(Report& report);

}  // namespace check
