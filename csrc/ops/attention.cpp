#include "ops/attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels/independent_rows.h"
#include "ops/scratch.h"
#include "thread_pool.h"

namespace moesaic {

MOESAIC_DEFINE_KERNELS(AttentionKernels, attention_kernels)

namespace {

// Fewer keys than this are not worth a task of their own: merging would cost more than it saves.
constexpr int64_t kMinKeysPerSplit = 256;
// Tasks per thread at which the load is balanced without cutting the keys.
constexpr int64_t kTasksPerThread = 2;

// Tiles are worth it from here on.
constexpr int64_t kTileQueriesFrom = 8, kTileRowsFrom = 32;
// Rows of a task. Results of tiles, in floats, should stay in the second-level cache.
constexpr int64_t kMinRows = 64, kMaxRows = 256, kMaxTileRows = 512, kMaxTileFloats = int64_t{128} << 10u;

// How the work is cut: row blocks of every (batch row, KV head), and key ranges where that is too few tasks.
class TaskGrid {
  public:
    TaskGrid(const AttentionArgs& a, int64_t num_threads) : a_(a), by_tiles_(goes_by_tiles(a, a.num_queries)) {
        const int64_t wanted = num_threads > 1 ? kTasksPerThread * num_threads : 1;
        num_rows_ = a.group * a.num_queries;
        block_rows_ = rows_of_task(a, by_tiles_, a.batch * a.num_kv_heads * num_rows_, wanted);
        num_blocks_ = (num_rows_ + block_rows_ - 1) / block_rows_;
        num_row_tasks_ = a.batch * a.num_kv_heads * num_blocks_;
        const int64_t splits = (wanted + num_row_tasks_ - 1) / std::max<int64_t>(num_row_tasks_, 1);
        num_splits_ = std::clamp<int64_t>(std::min(splits, longest_range() / kMinKeysPerSplit), 1, wanted);
    }

    bool by_tiles() const { return by_tiles_; }
    int64_t block_rows() const { return block_rows_; }
    int64_t size() const { return num_row_tasks_ * num_splits_; }
    int64_t num_row_tasks() const { return num_row_tasks_; }
    int64_t num_splits() const { return num_splits_; }
    // Row tasks of one key range are neighbours, so that threads that run together read the same keys. The last
    // rows come first: under a causal mask they see the most keys.
    int64_t row_task(int64_t index) const {
        const int64_t block_of_split = index % (num_blocks_ * num_splits_);
        return index / (num_blocks_ * num_splits_) * num_blocks_ + block_of_split % num_blocks_;
    }
    int64_t split(int64_t index) const { return index % (num_blocks_ * num_splits_) / num_blocks_; }

    AttentionTask task(int64_t row_task, int64_t split) const {
        AttentionTask task;
        task.batch = row_task / (a_.num_kv_heads * num_blocks_);
        task.kv_head = row_task / num_blocks_ % a_.num_kv_heads;
        task.row_begin = (num_blocks_ - 1 - row_task % num_blocks_) * block_rows_;
        task.num_rows = std::min(block_rows_, num_rows_ - task.row_begin);
        const int64_t first_token = task.row_begin / a_.group;
        const int64_t last_token = (task.row_begin + task.num_rows - 1) / a_.group;
        const int64_t begin = visible_keys(a_, task.batch, first_token).begin;
        const int64_t end = visible_keys(a_, task.batch, last_token).end;
        const int64_t length = std::max<int64_t>(end - begin, 0);
        const int64_t step = padded((length + num_splits_ - 1) / num_splits_);
        task.key_begin = begin + std::min(length, split * step);
        task.key_end = begin + std::min(length, (split + 1) * step);
        return task;
    }

  private:
    int64_t longest_range() const {
        int64_t longest = 0;
        for (int64_t b = 0; b < a_.batch; ++b) {
            const KeyRange range = visible_keys(a_, b, a_.num_queries - 1);
            longest = std::max(longest, range.end - range.begin);
        }
        return longest;
    }

    const AttentionArgs& a_;
    bool by_tiles_;
    int64_t num_rows_, block_rows_, num_blocks_, num_row_tasks_, num_splits_;
};

// The kernel of a grid's tasks, and the memory that it needs.
struct TaskKernel {
    explicit TaskKernel(const AttentionArgs& a, const TaskGrid& grid)
        : rows(grid.block_rows()), result_floats(rows * (2 + padded(a.value_dim))) {
        const AttentionKernels& kernels = attention_kernels();
        scratch_floats = (grid.by_tiles() ? kernels.tile_scratch_floats : kernels.scratch_floats)(a, rows);
        partial = grid.by_tiles() ? kernels.tile_partial : kernels.partial;
        finish = kernels.finish;
    }
    AttentionPartial result_at(float* memory) const { return {memory, memory + rows, memory + 2 * rows}; }

    int64_t rows, result_floats, scratch_floats;
    decltype(AttentionKernels::partial) partial;
    decltype(AttentionKernels::finish) finish;
};

// Each task covers all keys of its rows and writes the output by itself.
void run_whole(const AttentionArgs& a, const TaskGrid& grid) {
    const TaskKernel kernel(a, grid);
    Counter counter(grid.size());
    auto work = [&](Team&) {
        float* memory = thread_scratch(kernel.scratch_floats + kernel.result_floats);
        const AttentionPartial partial = kernel.result_at(memory + kernel.scratch_floats);
        for (int64_t index, end; counter.next(index, end);) {
            const AttentionTask task = grid.task(index, 0);
            kernel.partial(a, task, memory, partial);
            kernel.finish(a, task, &partial, 1);
        }
    };
    thread_pool().run(work);
}

// Several tasks share the keys of their rows; the one that finishes last merges the partial results.
void run_split(const AttentionArgs& a, const TaskGrid& grid) {
    const TaskKernel kernel(a, grid);
    float* results = caller_scratch(grid.size() * kernel.result_floats);
    std::vector<AttentionPartial> partials;
    for (int64_t i = 0; i < grid.size(); ++i) partials.push_back(kernel.result_at(results + i * kernel.result_floats));
    const auto finished = std::make_unique<std::atomic<int64_t>[]>(grid.num_row_tasks());
    Counter counter(grid.size());
    auto work = [&](Team&) {
        float* memory = thread_scratch(kernel.scratch_floats);
        for (int64_t index, end; counter.next(index, end);) {
            const int64_t row_task = grid.row_task(index);
            const AttentionPartial* of_rows = partials.data() + row_task * grid.num_splits();
            const AttentionTask task = grid.task(row_task, grid.split(index));
            kernel.partial(a, task, memory, of_rows[grid.split(index)]);
            if (finished[row_task].fetch_add(1, std::memory_order_acq_rel) + 1 == grid.num_splits()) {
                kernel.finish(a, task, of_rows, grid.num_splits());
            }
        }
    };
    thread_pool().run(work);
}

}  // namespace

bool goes_by_tiles(const AttentionArgs& a, int64_t num_queries) {
    if (attention_kernels().tile_partial == nullptr || independent_rows()) return false;
    if (a.cache_type != CacheType::kBF16 || a.mask_type != MaskType::kNone) return false;
    return num_queries >= kTileQueriesFrom && num_queries * a.group >= kTileRowsFrom;
}

int64_t rows_of_task(const AttentionArgs& a, bool by_tiles, int64_t num_rows, int64_t num_tasks) {
    int64_t rows = by_tiles ? kMaxTileRows : kMaxRows;
    while (rows > kMinRows && by_tiles && rows * a.value_dim > kMaxTileFloats) rows /= 2;
    while (rows > kMinRows && num_rows < rows * num_tasks) rows /= 2;
    return rows;
}

void attention(const AttentionArgs& a) {
    if (a.pages != nullptr) return paged_attention(a);
    if (a.batch == 0 || a.num_queries == 0 || a.num_kv_heads == 0 || a.group == 0) return;
    const TaskGrid grid(a, num_threads());
    if (grid.num_splits() == 1) {
        run_whole(a, grid);
    } else {
        run_split(a, grid);
    }
}

}  // namespace moesaic
