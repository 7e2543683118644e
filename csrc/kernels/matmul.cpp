#include "kernels/matmul.h"

#include <vector>

#include "kernels/independent_rows.h"

namespace moesaic {

namespace {

thread_local bool rows_are_independent = false;

std::vector<MatmulKernels> join(const std::vector<MatmulFamily>& families) {
    std::vector<MatmulKernels> all;
    for (const MatmulFamily& family : families) {
        all.insert(all.end(), family.kernels, family.kernels + family.num_formats);
    }
    return all;
}

// The same kernels but those by tiles.
std::vector<MatmulKernels> without_tiles(std::vector<MatmulKernels> kernels) {
    for (MatmulKernels& each : kernels) each.matmul_bf16 = nullptr;
    return kernels;
}

// Tables of what lives as long as the process.
std::vector<MatmulTable> tables_of(const std::vector<std::vector<MatmulKernels>>& kernels) {
    std::vector<MatmulTable> tables;
    for (const std::vector<MatmulKernels>& of_isa : kernels) tables.push_back({of_isa.data()});
    return tables;
}

}  // namespace

bool independent_rows() { return rows_are_independent; }

bool set_independent_rows(bool on) {
    const bool before = rows_are_independent;
    rows_are_independent = on;
    return before;
}

const MatmulTable& matmul_table() {
// The order of MOESAIC_FOR_EACH_FORMAT.
#define X(isa)                                                                                    \
    join({isa_##isa::float_kernels(), isa_##isa::block32_kernels(), isa_##isa::k_quant_kernels(), \
          isa_##isa::codebook_kernels(), isa_##isa::grouped_kernels()}),
    static const std::vector<std::vector<MatmulKernels>> all = {MOESAIC_FOR_EACH_ISA(X)};
#undef X
    static const std::vector<std::vector<MatmulKernels>> few = [] {
        std::vector<std::vector<MatmulKernels>> kernels;
        for (const std::vector<MatmulKernels>& of_isa : all) kernels.push_back(without_tiles(of_isa));
        return kernels;
    }();
    static const std::vector<MatmulTable> tables[2] = {tables_of(all), tables_of(few)};
    return tables[independent_rows() ? 1 : 0][static_cast<std::size_t>(active_isa_index())];
}

}  // namespace moesaic
