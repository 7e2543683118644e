// How attention over pages is cut into tasks.
//
// The keys of a row are cut into segments at places that are the same for every sequence, and the partial results of
// its segments are always folded together from the first to the last. So it makes no difference to the result whether
// one thread goes through all segments of a row or each is a task of its own, and that may depend on what keeps the
// threads busy: sequences of very different lengths in decode steps, or the rows of a long prompt.
#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "ops/attention.h"
#include "ops/scratch.h"
#include "thread_pool.h"

namespace moesaic {

namespace {

constexpr int64_t kShortestSegment = 256;  // a multiple of kAttentionKeyBlock
constexpr int64_t kSegmentsPerOctave = 8;  // a power of two
constexpr int64_t kEqualSegments = 2 * kSegmentsPerOctave;
// A row task is cut at its segments if it takes more than the n-th part of what each thread has to do.
constexpr int64_t kLargestShare = 3;
// What a key costs apart from the rows that look at it, in rows.
constexpr int64_t kRowsPerKey = 16;

// The first sixteen segments are equal; from there on every doubling of the length has eight.
int64_t segment_begin(int64_t segment) {
    if (segment <= kEqualSegments) return segment * kShortestSegment;
    const int64_t octave = (segment - kEqualSegments) / kSegmentsPerOctave;
    return ((segment % kSegmentsPerOctave + kSegmentsPerOctave) * 2 * kShortestSegment) << octave;
}

int64_t segment_of(int64_t key) {
    const int64_t units = key / kShortestSegment;
    if (units < kEqualSegments) return units;
    const int64_t octave = std::bit_width(static_cast<uint64_t>(units / kEqualSegments)) - 1;
    return kEqualSegments + octave * kSegmentsPerOctave + (units >> (octave + 1)) - kSegmentsPerOctave;
}

// Some rows of one sequence and KV head, with all keys that they see.
struct RowTask {
    AttentionTask task;
    int64_t first_segment, num_segments;
    int64_t cost;
    int64_t results;  // offset of the partial results of the segments, where they are tasks of their own
};

// What a thread takes: all of a row task, or one segment of it.
struct Item {
    int64_t row_task, segment;  // -1: all
    int64_t cost;
};

AttentionTask segment_task(const RowTask& rows, int64_t segment) {
    AttentionTask task = rows.task;
    task.key_begin = std::max(task.key_begin, segment_begin(rows.first_segment + segment));
    task.key_end = std::min(task.key_end, segment_begin(rows.first_segment + segment + 1));
    return task;
}

int64_t partial_floats(const AttentionArgs& a, int64_t num_rows) {
    return 2 * padded(num_rows) + num_rows * padded(a.value_dim);
}

AttentionPartial partial_at(float* memory, int64_t num_rows) {
    return {memory, memory + padded(num_rows), memory + 2 * padded(num_rows)};
}

RowTask row_task(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t row, int64_t num_rows) {
    RowTask rows{};
    AttentionTask& task = rows.task;
    task.batch = sequence;
    task.kv_head = kv_head;
    task.row_begin = row;
    task.num_rows = std::min(kAttentionRows, num_rows - row);
    const int64_t step = key_step(a);
    task.key_begin = visible_keys(a, sequence, row / a.group).begin / step * step;
    task.key_end = visible_keys(a, sequence, (row + task.num_rows - 1) / a.group).end;
    rows.first_segment = segment_of(task.key_begin);
    rows.num_segments = task.key_end > task.key_begin ? segment_of(task.key_end - 1) + 1 - rows.first_segment : 0;
    rows.cost = (task.key_end - task.key_begin + kAttentionKeyBlock) * (task.num_rows + kRowsPerKey);
    return rows;
}

// All work of a call, longest first.
struct Work {
    std::vector<RowTask> rows;
    std::vector<Item> items;
    int64_t num_results = 0;  // floats

    Work(const AttentionArgs& a, int64_t num_threads) {
        int64_t total = 0;
        for (int64_t sequence = 0; sequence < a.batch; ++sequence) {
            const int64_t num_rows = num_queries_of(a, sequence) * a.group;
            for (int64_t row = 0; row < num_rows; row += kAttentionRows) {
                for (int64_t head = 0; head < a.num_kv_heads; ++head) {
                    rows.push_back(row_task(a, sequence, head, row, num_rows));
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
            items.push_back({index, i, (part.key_end - part.key_begin) * (part.num_rows + kRowsPerKey)});
        }
    }
};

class Runner {
  public:
    explicit Runner(const AttentionArgs& a, const Work& work)
        : a_(a),
          work_(work),
          kernels_(attention_kernels()),
          scratch_floats_(kernels_.scratch_floats(a)),
          results_(caller_scratch(work.num_results)),
          finished_(std::make_unique<std::atomic<int64_t>[]>(work.rows.size())) {}

    // Takes items until none are left.
    void work(Counter& counter) {
        float* scratch = thread_scratch(scratch_floats_ + 2 * partial_floats(a_, kAttentionRows));
        for (int64_t index, end; counter.next(index, end);) {
            const Item& item = work_.items[index];
            if (item.segment < 0) {
                whole(work_.rows[item.row_task], scratch);
            } else {
                segment(item, scratch);
            }
        }
    }

  private:
    void whole(const RowTask& rows, float* scratch) const {
        const int64_t num_rows = rows.task.num_rows;
        float* memory = scratch + scratch_floats_;
        const AttentionPartial total = partial_at(memory, num_rows);
        const AttentionPartial part = partial_at(memory + partial_floats(a_, num_rows), num_rows);
        kernels_.partial(a_, rows.num_segments > 0 ? segment_task(rows, 0) : rows.task, scratch, total);
        for (int64_t i = 1; i < rows.num_segments; ++i) {
            kernels_.partial(a_, segment_task(rows, i), scratch, part);
            kernels_.fold(a_, num_rows, total, part);
        }
        kernels_.finish(a_, rows.task, &total, 1);
    }

    // The thread that is the last with a segment of some rows folds all of them.
    void segment(const Item& item, float* scratch) {
        const RowTask& rows = work_.rows[item.row_task];
        const int64_t num_rows = rows.task.num_rows;
        auto result = [&](int64_t i) {
            return partial_at(results_ + rows.results + i * partial_floats(a_, num_rows), num_rows);
        };
        kernels_.partial(a_, segment_task(rows, item.segment), scratch, result(item.segment));
        if (finished_[item.row_task].fetch_add(1, std::memory_order_acq_rel) + 1 < rows.num_segments) return;
        const AttentionPartial total = result(0);
        for (int64_t i = 1; i < rows.num_segments; ++i) kernels_.fold(a_, num_rows, total, result(i));
        kernels_.finish(a_, rows.task, &total, 1);
    }

    const AttentionArgs& a_;
    const Work& work_;
    const AttentionKernels& kernels_;
    const int64_t scratch_floats_;
    float* results_;
    std::unique_ptr<std::atomic<int64_t>[]> finished_;
};

}  // namespace

void paged_attention(const AttentionArgs& a) {
    const Work work(a, num_threads());
    if (work.items.empty()) return;
    Runner runner(a, work);
    Counter counter(static_cast<int64_t>(work.items.size()));
    auto task = [&](Team&) { runner.work(counter); };
    thread_pool().run(task);
}

}  // namespace moesaic
