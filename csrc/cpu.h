// What this processor and this process may use. Knows no kernels.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace moesaic {

// Can the instruction set `name` (a row of isa/isas.cmake) run here? False for unknown names.
bool cpu_supports_isa(const char* name);

// Names and presence of the processor features that kernels may use, in a fixed order.
std::vector<std::pair<std::string, bool>> cpu_features();

// The physical cores of the main thread's affinity mask, at least one, each with its CPUs in that mask. Two
// hyperthreads of one core count once because both wait for the same memory.
std::vector<std::vector<int>> usable_cores();

// Physical cores this process may use: distinct cores of its affinity mask, at most its cgroup quota, at least 1.
int num_usable_cores();

// Bytes of the second-level cache of a core; 256 KiB where the system does not say.
std::int64_t second_level_cache_bytes();

}  // namespace moesaic
