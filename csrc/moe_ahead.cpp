#include "moe_ahead.h"

#include <algorithm>
#include <atomic>

#include "cpu.h"
#include "isa/pause.h"
#include "kernels/matmul.h"
#include "moe_items.h"
#include "moe_rows.h"
#include "read_ahead.h"
#include "thread_pool.h"

namespace moesaic {

namespace {

// Bytes of an expert's gate and up of all slices.
std::int64_t inner_bytes(const Experts& experts) {
    std::int64_t total = 0;
    for (const ExpertSlice& slice : experts.slices) {
        total += slice.up.matrix_bytes + (slice.gate.format != nullptr ? slice.gate.matrix_bytes : 0);
    }
    return total;
}

// What a thread reads, in the order in which it would compute.
ReadAhead share_of(const Experts& experts, std::span<const std::int64_t> wanted, std::span<const ItemRun> pairs) {
    ReadAhead ahead(second_level_cache_bytes() / 2);
    for (const std::int64_t expert : wanted) {
        for (const ItemRun& run : pairs) {
            const ExpertSlice& slice = experts.slices[run.slice];
            for (const ExpertMatrices* m : {&slice.gate, &slice.up}) {
                if (m->format == nullptr) continue;
                const std::int64_t pair_bytes = kMaxPanels * m->format->panel_bytes(experts.hidden);
                const std::int64_t begin = run.pair * pair_bytes;
                const std::int64_t end = std::min(m->matrix_bytes, begin + (run.end - run.first) * pair_bytes);
                ahead.add(m->weights + expert * m->matrix_bytes + begin, end - begin);
            }
        }
    }
    return ahead;
}

}  // namespace

std::vector<std::int64_t> read_experts_ahead(const Experts& experts, std::span<const std::int64_t> wanted, Until until,
                                             const Beside* beside) {
    ThreadPool& pool = thread_pool();
    const std::int64_t room = second_level_cache_bytes() / 2 * pool.num_threads();
    const std::int64_t most = (room + inner_bytes(experts) - 1) / inner_bytes(experts);
    std::vector<std::int64_t> begun;
    for (const std::int64_t expert : wanted) {
        if (expert < 0 || expert >= experts.num_experts || static_cast<std::int64_t>(begun.size()) == most) break;
        begun.push_back(expert);
    }
    if (begun.empty()) {
        if (beside != nullptr) (*beside)();
        return begun;
    }
    // The other side writes to this word; atomic_ref takes no pointer to const.
    const std::atomic_ref<std::int64_t> word(*const_cast<std::int64_t*>(until.word));
    std::atomic<bool> stop{false};
    std::atomic<int> finished{0};
    const std::vector<std::int64_t> pairs = pairs_of_slices(experts);
    pool.run([&](Team& team) {
        if (beside != nullptr && team.thread() == 0) (*beside)();
        const std::vector<ItemRun> own = pairs_to_read(pairs, pool.threads_per_node(), team.thread());
        ReadAhead ahead = share_of(experts, begun, own);
        while (!ahead.is_done() && !stop.load(std::memory_order_relaxed)) {
            ahead();
            if (team.thread() == 0 && word.load(std::memory_order_relaxed) >= until.number) stop.store(true);
        }
        finished.fetch_add(1, std::memory_order_relaxed);
        // One looks for the number: if all did, it would take longer to arrive.
        while (team.thread() == 0 && finished.load(std::memory_order_relaxed) < team.num_threads() && !stop.load()) {
            pause();
            if (word.load(std::memory_order_relaxed) >= until.number) stop.store(true);
        }
    });
    return begun;
}

}  // namespace moesaic
