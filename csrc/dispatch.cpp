#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu.h"

namespace moesaic {

namespace {

#define MOESAIC_ISA_STRING(isa) #isa,
constexpr const char* kIsaNames[] = {MOESAIC_FOR_EACH_ISA(MOESAIC_ISA_STRING)};
constexpr int kNumIsas = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

int best_isa() {
    for (int i = 0; i < kNumIsas; ++i) {
        if (cpu_supports_isa(kIsaNames[i])) return i;
    }
    return kNumIsas - 1;  // generic
}

std::atomic<int>& active() {
    static std::atomic<int> index{best_isa()};
    return index;
}

}  // namespace

int active_isa_index() { return active().load(std::memory_order_relaxed); }

const char* active_isa() { return kIsaNames[active_isa_index()]; }

std::vector<std::string> left_out_isas() {
    std::vector<std::string> names;
#define MOESAIC_ADD_IF_SUPPORTED(isa) \
    if (cpu_supports_isa(#isa)) names.emplace_back(#isa);
    MOESAIC_FOR_EACH_LEFT_OUT_ISA(MOESAIC_ADD_IF_SUPPORTED)
#undef MOESAIC_ADD_IF_SUPPORTED
    return names;
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const char* name : kIsaNames) {
        if (cpu_supports_isa(name)) names.emplace_back(name);
    }
    return names;
}

void set_isa(const std::string& name) {
    for (int i = 0; i < kNumIsas; ++i) {
        if (name != kIsaNames[i]) continue;
        if (!cpu_supports_isa(kIsaNames[i])) {
            throw std::invalid_argument("instruction set '" + name + "' cannot run on this processor");
        }
        active().store(i, std::memory_order_relaxed);
        return;
    }
    std::string known;
    for (const char* isa : kIsaNames) known += (known.empty() ? "" : ", ") + std::string(isa);
    throw std::invalid_argument("unknown instruction set '" + name + "': expected one of " + known);
}

}  // namespace moesaic
