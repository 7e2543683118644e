#include "kernels/matmul.h"

#include <vector>

namespace moesaic {

namespace {

std::vector<MatmulKernels> join(const std::vector<MatmulFamily>& families) {
    std::vector<MatmulKernels> all;
    for (const MatmulFamily& family : families) {
        all.insert(all.end(), family.kernels, family.kernels + family.num_formats);
    }
    return all;
}

}  // namespace

const MatmulTable& matmul_table() {
// The order of MOESAIC_FOR_EACH_FORMAT.
#define X(isa)                                                                                    \
    join({isa_##isa::float_kernels(), isa_##isa::block32_kernels(), isa_##isa::k_quant_kernels(), \
          isa_##isa::codebook_kernels(), isa_##isa::grouped_kernels()}),
    static const std::vector<MatmulKernels> kernels[] = {MOESAIC_FOR_EACH_ISA(X)};
#undef X
#define X(isa) MatmulTable{kernels[next++].data()},
    static const std::vector<MatmulTable> tables = [] {
        int next = 0;
        return std::vector<MatmulTable>{MOESAIC_FOR_EACH_ISA(X)};
    }();
#undef X
    return tables[static_cast<std::size_t>(active_isa_index())];
}

}  // namespace moesaic
