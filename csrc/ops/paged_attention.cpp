// How attention over pages is cut into tasks.
//
// The keys of a row are cut into segments at places that are the same for every sequence, and the partial results of
// its segments are always folded together from the first to the last. So it makes no difference to the result whether
// one thread goes through all segments of a row or each is a task of its own, and that may depend on what keeps the
// threads busy: sequences of very different lengths in decode steps, or the rows of a long prompt. Rows that go by
// tiles have longer segments, which makes them fewer results to fold; among themselves the same holds for them.
#include "ops/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "kernels/scratch.h"
#include "ops/scratch.h"
#include "thread_pool.h"

namespace moesaic {

namespace {

constexpr int64_t kShortestSegment = 256;       // a multiple of kAttentionKeyBlock
constexpr int64_t kShortestTileSegment = 2048;  // a multiple of kTileKeys
constexpr int64_t kSegmentsPerOctave = 8;       // a power of two
constexpr int64_t kEqualSegments = 2 * kSegmentsPerOctave;
// A row task is cut at its segments if it takes more than the n-th part of what each thread has to do.
constexpr int64_t kLargestShare = 3;
// What a key costs apart from the rows that look at it, in rows, and how much faster those are by tiles.
constexpr int64_t kRowsPerKey = 16, kTileSpeedup = 8;

// The first sixteen segments are equal; from there on every doubling of the length has eight.
int64_t segment_begin(int64_t segment, int64_t shortest) {
    if (segment <= kEqualSegments) return segment * shortest;
    const int64_t octave = (segment - kEqualSegments) / kSegmentsPerOctave;
    return ((segment % kSegmentsPerOctave + kSegmentsPerOctave) * 2 * shortest) << octave;
}

int64_t segment_of(int64_t key, int64_t shortest) {
    const int64_t units = key / shortest;
    if (units < kEqualSegments) return units;
    const int64_t octave = std::bit_width(static_cast<uint64_t>(units / kEqualSegments)) - 1;
    return kEqualSegments + octave * kSegmentsPerOctave + (units >> (octave + 1)) - kSegmentsPerOctave;
}

// Some rows of one sequence and KV head, with all keys that they see.
struct RowTask {
    AttentionTask task;
    bool by_tiles;
    int64_t first_segment, num_segments;
    int64_t cost;
    int64_t results;  // offset of the partial results of the segments, where they are tasks of their own
};

// What a thread takes: all of a row task, or one segment of it.
struct Item {
    int64_t row_task, segment;  // -1: all
    int64_t cost;
};

int64_t shortest_segment(bool by_tiles) { return by_tiles ? kShortestTileSegment : kShortestSegment; }

AttentionTask segment_task(const RowTask& rows, int64_t segment) {
    AttentionTask task = rows.task;
    const int64_t shortest = shortest_segment(rows.by_tiles), number = rows.first_segment + segment;
    task.key_begin = std::max(task.key_begin, segment_begin(number, shortest));
    task.key_end = std::min(task.key_end, segment_begin(number + 1, shortest));
    return task;
}

int64_t cost_of(int64_t num_keys, int64_t num_rows, bool by_tiles) {
    return num_keys * ((by_tiles ? num_rows / kTileSpeedup : num_rows) + kRowsPerKey);
}

int64_t partial_floats(const AttentionArgs& a, int64_t num_rows) {
    return 2 * padded(num_rows) + num_rows * padded(a.value_dim);
}

AttentionPartial partial_at(float* memory, int64_t num_rows) {
    return {memory, memory + padded(num_rows), memory + 2 * padded(num_rows)};
}

// How the rows of a sequence are cut.
struct RowCut {
    int64_t num_rows, rows_of_task;
    bool by_tiles;
};

RowCut cut_rows(const AttentionArgs& a, int64_t sequence, int64_t num_threads) {
    const int64_t num_queries = num_queries_of(a, sequence), num_rows = num_queries * a.group;
    const bool by_tiles = goes_by_tiles(a, num_queries);
    // Long sequences are cut at their segments too.
    const int64_t last = std::max<int64_t>(a.pages->num_keys[sequence] - 1, 0);
    const int64_t num_segments = segment_of(last, shortest_segment(by_tiles)) + 1;
    const int64_t num_tasks = num_threads > 1 ? kLargestShare * num_threads : 1;
    return {num_rows, rows_of_task(a, by_tiles, num_rows * a.num_kv_heads * num_segments, num_tasks), by_tiles};
}

RowTask row_task(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t row, const RowCut& cut) {
    RowTask rows{};
    AttentionTask& task = rows.task;
    task.batch = sequence;
    task.kv_head = kv_head;
    task.row_begin = row;
    task.num_rows = std::min(cut.rows_of_task, cut.num_rows - row);
    const int64_t step = cut.by_tiles ? kTileKeys : key_step(a);
    task.key_begin = visible_keys(a, sequence, row / a.group).begin / step * step;
    task.key_end = visible_keys(a, sequence, (row + task.num_rows - 1) / a.group).end;
    rows.by_tiles = cut.by_tiles;
    const int64_t shortest = shortest_segment(cut.by_tiles);
    rows.first_segment = segment_of(task.key_begin, shortest);
    rows.num_segments =
        task.key_end > task.key_begin ? segment_of(task.key_end - 1, shortest) + 1 - rows.first_segment : 0;
    rows.cost = cost_of(task.key_end - task.key_begin + kAttentionKeyBlock, task.num_rows, cut.by_tiles);
    return rows;
}

// All work of a call, longest first.
struct Work {
    std::vector<RowTask> rows;
    std::vector<Item> items;
    int64_t num_results = 0;  // floats
    // The rows that a task has at most, with and without tiles; 0: there are none such.
    int64_t largest_task = 0, largest_tile_task = 0;

    Work(const AttentionArgs& a, int64_t num_threads) {
        int64_t total = 0;
        for (int64_t sequence = 0; sequence < a.batch; ++sequence) {
            const RowCut cut = cut_rows(a, sequence, num_threads);
            int64_t& largest_of_kind = cut.by_tiles ? largest_tile_task : largest_task;
            largest_of_kind = std::max(largest_of_kind, std::min(cut.num_rows, cut.rows_of_task));
            for (int64_t row = 0; row < cut.num_rows; row += cut.rows_of_task) {
                for (int64_t head = 0; head < a.num_kv_heads; ++head) {
                    rows.push_back(row_task(a, sequence, head, row, cut));
                    total += rows.back().cost;
                }
            }
        }
        const int64_t largest = num_threads > 1 ? total / (num_threads * kLargestShare) : total;
        for (std::size_t i = 0; i < rows.size(); ++i) add_items(a, static_cast<int64_t>(i), largest);
        std::sort(items.begin(), items.end(), [](const Item& x, const Item& y) {
            if (x.cost != y.cost) return x.cost > y.cost;
            return x.row_task != y.row_task ? x.row_task < y.row_task : x.segment < y.segment;
        });
    }

  private:
    void add_items(const AttentionArgs& a, int64_t index, int64_t largest) {
        RowTask& task = rows[index];
        if (task.cost <= largest || task.num_segments < 2) {
            items.push_back({index, -1, task.cost});
            return;
        }
        task.results = num_results;
        num_results += task.num_segments * partial_floats(a, task.task.num_rows);
        for (int64_t i = 0; i < task.num_segments; ++i) {
            const AttentionTask part = segment_task(task, i);
            items.push_back({index, i, cost_of(part.key_end - part.key_begin, part.num_rows, task.by_tiles)});
        }
    }
};

}  // namespace

struct PagedTasks::State {
    State(const AttentionArgs& a, int64_t num_threads)
        : work(a, num_threads),
          result_floats(partial_floats(a, std::max(work.largest_task, work.largest_tile_task))),
          results(static_cast<std::size_t>(work.num_results)),
          finished(std::make_unique<std::atomic<int64_t>[]>(work.rows.size())) {
        const AttentionKernels& kernels = attention_kernels();
        const int64_t of_tiles =
            work.largest_tile_task > 0 ? kernels.tile_scratch_floats(a, work.largest_tile_task) : 0;
        scratch_floats = std::max(of_tiles, work.largest_task > 0 ? kernels.scratch_floats(a, work.largest_task) : 0);
    }

    static void partial(const AttentionArgs& a, const RowTask& rows, const AttentionTask& task, float* scratch,
                        const AttentionPartial& result) {
        const AttentionKernels& kernels = attention_kernels();
        (rows.by_tiles ? kernels.tile_partial : kernels.partial)(a, task, scratch, result);
    }

    void whole(const AttentionArgs& a, const RowTask& rows, float* scratch) const {
        const AttentionKernels& kernels = attention_kernels();
        const int64_t num_rows = rows.task.num_rows;
        float* memory = scratch + scratch_floats;
        const AttentionPartial total = partial_at(memory, num_rows);
        const AttentionPartial part = partial_at(memory + result_floats, num_rows);
        partial(a, rows, rows.num_segments > 0 ? segment_task(rows, 0) : rows.task, scratch, total);
        for (int64_t i = 1; i < rows.num_segments; ++i) {
            partial(a, rows, segment_task(rows, i), scratch, part);
            kernels.fold(a, num_rows, total, part);
        }
        kernels.finish(a, rows.task, &total, 1);
    }

    // The thread that is the last with a segment of some rows folds all of them.
    void segment(const AttentionArgs& a, const Item& item, float* scratch) {
        const AttentionKernels& kernels = attention_kernels();
        const RowTask& rows = work.rows[item.row_task];
        const int64_t num_rows = rows.task.num_rows;
        auto result = [&](int64_t i) {
            return partial_at(results.data() + rows.results + i * partial_floats(a, num_rows), num_rows);
        };
        partial(a, rows, segment_task(rows, item.segment), scratch, result(item.segment));
        std::atomic<int64_t>& count = finished[item.row_task];
        if (count.fetch_add(1, std::memory_order_acq_rel) + 1 < rows.num_segments) return;
        count.store(0, std::memory_order_relaxed);  // for the next time
        const AttentionPartial total = result(0);
        for (int64_t i = 1; i < rows.num_segments; ++i) kernels.fold(a, num_rows, total, result(i));
        kernels.finish(a, rows.task, &total, 1);
    }

    Work work;
    int64_t result_floats, scratch_floats = 0;
    AlignedArray<float> results;
    std::unique_ptr<std::atomic<int64_t>[]> finished;
};

PagedTasks::PagedTasks(const AttentionArgs& a, int64_t num_threads) : state_(std::make_unique<State>(a, num_threads)) {}
PagedTasks::~PagedTasks() = default;
PagedTasks::PagedTasks(PagedTasks&&) noexcept = default;

int64_t PagedTasks::size() const { return static_cast<int64_t>(state_->work.items.size()); }

int64_t PagedTasks::kv_head(int64_t index) const {
    return state_->work.rows[state_->work.items[index].row_task].task.kv_head;
}

bool PagedTasks::sees_last_key(int64_t index) const {
    const Item& item = state_->work.items[index];
    return item.segment < 0 || item.segment + 1 == state_->work.rows[item.row_task].num_segments;
}

KeyRange PagedTasks::keys(int64_t index) const {
    const Item& item = state_->work.items[index];
    const RowTask& rows = state_->work.rows[item.row_task];
    const AttentionTask task = item.segment < 0 ? rows.task : segment_task(rows, item.segment);
    return {task.key_begin, task.key_end};
}

void PagedTasks::run(const AttentionArgs& a, int64_t index) {
    const Item& item = state_->work.items[index];
    float* scratch = thread_scratch(state_->scratch_floats + 2 * state_->result_floats);
    if (item.segment < 0) {
        state_->whole(a, state_->work.rows[item.row_task], scratch);
    } else {
        state_->segment(a, item, scratch);
    }
}

void paged_attention(const AttentionArgs& a) {
    PagedTasks tasks(a, num_threads());
    if (tasks.size() == 0) return;
    Counter counter(tasks.size());
    auto task = [&](Team&) {
        for (int64_t index, end; counter.next(index, end);) tasks.run(a, index);
    };
    thread_pool().run(task);
}

}  // namespace moesaic
