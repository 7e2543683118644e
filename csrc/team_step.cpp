#include "team_step.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "block_steps.h"
#include "ops/paged_attention.h"
#include "team_experts.h"
#include "team_products.h"

namespace moesaic {

namespace {

constexpr std::int64_t kMostGroup = 64;  // rows of a sequence and KV head that are never cut into several tasks

constexpr std::int64_t kKeysAhead = 128;  // of a task, which are fetched before it may begin

// Attention of all halves that are alike in what their tasks depend on: the tasks, dealt to the threads.
struct Plan {
    std::int64_t num_heads, num_kv_heads, head_dim, window;
    PagedTasks tasks;
    std::vector<std::int64_t> order;  // of tasks; each thread has a part of it, and tasks that take long are apart

    Plan(const AttentionBlock& b, const AttentionBlockCall& c, int num_threads)
        : num_heads(b.num_heads),
          num_kv_heads(b.num_kv_heads),
          head_dim(b.head_dim),
          window(c.cache.window),
          tasks(attention_of(b, c, nullptr, nullptr), num_threads),
          order(static_cast<std::size_t>(tasks.size())) {
        std::int64_t task = 0;  // the first take longest
        for (std::int64_t round = 0; task < tasks.size(); ++round) {
            for (std::int64_t t = 0; t < num_threads; ++t) {
                const std::int64_t begin = tasks.size() * t / num_threads, end = tasks.size() * (t + 1) / num_threads;
                if (begin + round < end) order[static_cast<std::size_t>(begin + round)] = task++;
            }
        }
    }
    bool serves(const AttentionBlock& b, const AttentionBlockCall& c) const {
        return num_heads == b.num_heads && num_kv_heads == b.num_kv_heads && head_dim == b.head_dim &&
               window == c.cache.window;
    }
};

// Most of what the halves need.
struct Sizes {
    std::int64_t hidden = 0, queries = 0, keys = 0, logits = 0, num_chosen = 1, pairs = 0;

    explicit Sizes(std::span<const LayerHalf> halves) {
        for (const LayerHalf& half : halves) {
            if (half.attention != nullptr) {
                hidden = std::max(hidden, half.attention->q.cols);
                queries = std::max(queries, half.attention->q.rows);
                keys = std::max(keys, half.attention->k.rows);
            } else {
                const FeedForwardSizes sizes = sizes_of(*half.feed_forward);
                hidden = std::max(hidden, half.feed_forward->experts->hidden);
                logits = std::max(logits, sizes.logits);
                num_chosen = std::max(num_chosen, sizes.num_chosen);
                pairs = std::max(pairs, sizes.pairs);
            }
        }
    }
    std::int64_t inner_stride() const { return pairs | 1; }
    std::int64_t inner() const { return num_chosen * inner_stride() * kOutputStride; }
};

class TeamStep {
  public:
    TeamStep(std::span<const LayerHalf> halves, const AttentionBlockCall& call, ThreadPool& pool)
        : halves_(halves), call_(call), x_(call.out), sizes_(halves), queue_(groups_of(pool)) {
        const std::int64_t floats =
            2 * sizes_.queries + 2 * sizes_.keys + sizes_.logits + kPanelRows + sizes_.inner() + 6 * 16;
        float* memory = floats_.reserve(static_cast<std::size_t>(floats));
        auto take = [&](std::int64_t count) { return std::exchange(memory, memory + padded(count)); };
        q_ = take(sizes_.queries);
        attended_ = take(sizes_.queries);
        k_ = take(sizes_.keys);
        v_ = take(sizes_.keys);
        logits_ = take(sizes_.logits + kPanelRows);
        inner_ = {groups_memory_.reserve(static_cast<std::size_t>(sizes_.num_chosen * sizes_.inner_stride())),
                  take(sizes_.inner()), sizes_.inner_stride()};
        for (const LayerHalf& half : halves) plan_of_.push_back(plan(half, pool.num_threads()));
    }

    // By every thread of the team.
    void run(Team& team) {
        static thread_local TeamMemory own;
        prepare(own);
        for (std::size_t i = 0; i < halves_.size(); ++i) {
            const LayerHalf* next = i + 1 < halves_.size() ? &halves_[i + 1] : nullptr;
            if (halves_[i].attention != nullptr) {
                attention(team, own, halves_[i], plans_[plan_of_[i]], next);
            } else {
                feed_forward(team, own, *halves_[i].feed_forward, next);
            }
        }
    }

  private:
    static WorkQueue groups_of(const ThreadPool& pool) {
        std::vector<WorkGroup> groups;
        for (const int threads : pool.threads_per_node()) groups.push_back({0, threads});
        return WorkQueue(groups);
    }

    std::size_t plan(const LayerHalf& half, int num_threads) {
        if (half.attention == nullptr) return 0;
        AttentionBlockCall call = call_;
        call.cache = half.cache;
        for (std::size_t i = 0; i < plans_.size(); ++i) {
            if (plans_[i].serves(*half.attention, call)) return i;
        }
        plans_.emplace_back(*half.attention, call, num_threads);
        return plans_.size() - 1;
    }

    void prepare(TeamMemory& own) const {
        own.normed.reserve(static_cast<std::size_t>(padded(sizes_.hidden)));
        own.query.reserve(static_cast<std::size_t>(padded(sizes_.queries)));
        own.key.reserve(static_cast<std::size_t>(padded(sizes_.keys)));
        own.products.reserve(output_size(1));
        own.gate.reserve(output_size(1));
        own.sums.reserve(kOutputStride);
        own.shared.reserve(kOutputStride);
    }

    void normalize_x(const NormWeight& norm, std::int64_t width, bool quantized, TeamMemory& own) const {
        normalize(norm, x_, width, 1, width, own.normed.data());
        own.token.set(own.normed.data(), width, quantized);
    }

    static void add_first(Ahead& ahead, const Team& team, const LayerHalf* next) {
        if (next == nullptr) return;
        if (next->attention == nullptr) return add_router(ahead, *next->feed_forward, team);
        const AttentionBlock& b = *next->attention;
        const PanelRows inputs[] = {rows_of(b.q), rows_of(b.k), rows_of(b.v)};
        add_own_part(ahead, team, inputs);
    }

    void attention(Team& team, TeamMemory& own, const LayerHalf& half, Plan& plan, const LayerHalf* next) {
        const AttentionBlock& b = *half.attention;
        const PanelRows inputs[] = {rows_of(b.q), rows_of(b.k), rows_of(b.v)}, output[] = {rows_of(b.o)};
        float* const outs[] = {q_, k_, v_};
        const WorkQueue::Range share = own_part(team, plan.tasks.size());
        if (share.begin < share.end) fetch_keys(half, plan, share.begin);
        normalize_x(b.norm, b.q.cols, inputs[0].quantized() || inputs[1].quantized() || inputs[2].quantized(), own);
        multiply_all(team, queue_, inputs, own.token, own.products.data(),
                     [&](std::size_t i, std::int64_t first, std::int64_t rows, const float* products) {
                         std::copy_n(products, rows, outs[i] + first);
                     });
        own.ahead.clear();
        add_own_part(own.ahead, team, output);
        add_first(own.ahead, team, next);
        team.barrier(own.ahead);

        queue_.give(team.thread(), share.begin, share.end);
        for (std::int64_t i; (i = queue_.next(team.thread())) >= 0;) {
            attend(half, plan.tasks, plan.order[static_cast<std::size_t>(i)], own);
        }
        team.barrier(own.ahead);

        own.ahead.clear();
        if (next != nullptr && next->attention == nullptr) {
            // Few threads have rows of a router; the others take over rows of theirs here.
            add_first(own.ahead, team, next);
            own.ahead.rest();
        }
        own.token.set(attended_, b.o.cols, output[0].quantized());
        multiply_all(team, queue_, output, own.token, own.products.data(),
                     [&](std::size_t, std::int64_t first, std::int64_t rows, const float* products) {
                         add_scaled(x_ + first, products, b.residual_scale, 1, rows, x_ + first);
                     });
        team.barrier();
    }

    // Begins to fetch what a thread's first task looks at, while it multiplies: rows of one head lie far apart, and one
    // after the other would take longer than the task.
    void fetch_keys(const LayerHalf& half, const Plan& plan, std::int64_t index) const {
        const std::int64_t task = plan.order[static_cast<std::size_t>(index)], head = plan.tasks.kv_head(task);
        AttentionBlockCall c = call_;
        c.cache = half.cache;
        const AttentionArgs a = attention_of(*half.attention, c, nullptr, nullptr);
        const std::int64_t element = a.cache_type == CacheType::kF32 ? 4 : 2;
        const KeyRange keys = plan.tasks.keys(task);
        const auto fetch = [&](const void* data, const Strides3& s, std::int64_t key) {
            const char* row = static_cast<const char*>(data) + (key_offset(a, s, 0, key) + head * s.head) * element;
            for (std::int64_t i = 0; i < half.attention->head_dim * element; i += 64) __builtin_prefetch(row + i, 0, 2);
        };
        for (std::int64_t key = keys.begin; key < std::min(keys.end, keys.begin + kKeysAhead); ++key) {
            fetch(a.parts[0].k, a.parts[0].k_stride, key);
            fetch(a.v, a.v_stride, key);
        }
    }

    // A task of the attention; queries are normalised and rotated for it, and so is the new key, which whoever looks at
    // it first appends to the cache.
    void attend(const LayerHalf& half, PagedTasks& tasks, std::int64_t task, TeamMemory& own) const {
        const AttentionBlock& b = *half.attention;
        AttentionBlockCall c = call_;
        c.cache = half.cache;
        const bool all = b.head_norm == HeadNorm::kAllHeads;
        const std::int64_t group = b.num_heads / b.num_kv_heads, head = tasks.kv_head(task);
        const std::int64_t first = all ? 0 : head, count = all ? b.num_kv_heads : 1;
        float* query = own.query.data() + first * group * b.head_dim;
        float* key = own.key.data() + first * b.head_dim;
        std::copy_n(q_ + first * group * b.head_dim, count * group * b.head_dim, query);
        std::copy_n(k_ + first * b.head_dim, count * b.head_dim, key);
        norm_and_rotate(heads_of(b, c, {query, count * group}, {key, count}));
        if (tasks.sees_last_key(task)) {
            append_head(c, own.key.data() + head * b.head_dim, head, b.head_dim, c.cache.keys, c.cache.key_stride);
            append_head(c, v_ + head * b.head_dim, head, b.head_dim, c.cache.values, c.cache.value_stride);
        }
        tasks.run(attention_of(b, c, own.query.data(), attended_), task);
    }

    void feed_forward(Team& team, TeamMemory& own, const FeedForwardBlock& b, const LayerHalf* next) {
        normalize_x(b.norm, b.experts->hidden, true, own);
        if (b.router.format != nullptr || b.shared_gate.format != nullptr) {
            multiply_router(b, team, queue_, own, logits_);
            team.barrier();
        }
        choose_experts(b, logits_, own);
        expand_experts(b, team, queue_, own, inner_);
        own.ahead.clear();
        add_down(own.ahead, b, team, own.chosen);
        team.barrier(own.ahead);

        contract_experts(b, team, queue_, own, inner_, logits_ + b.router.rows, x_);
        own.ahead.clear();
        add_first(own.ahead, team, next);
        team.barrier(own.ahead);
    }

    std::span<const LayerHalf> halves_;
    const AttentionBlockCall& call_;
    float* x_;
    Sizes sizes_;
    WorkQueue queue_;
    std::vector<Plan> plans_;
    std::vector<std::size_t> plan_of_;  // of each half
    AlignedArray<float> floats_;
    AlignedArray<ActivationGroup> groups_memory_;
    float *q_, *attended_, *k_, *v_, *logits_;
    InnerRows inner_;
};

}  // namespace

bool runs_in_team(const AttentionBlock& b, const AttentionBlockCall& c) {
    if (c.paged == nullptr || c.batch != 1 || c.num_tokens != 1 || c.paged->num_sequences != 1) return false;
    // All heads of a KV head are rows of one task, which appends its key.
    return c.x == c.out && c.paged->pages.num_keys[0] > 0 && b.num_heads / b.num_kv_heads <= kMostGroup;
}

bool runs_in_team(const FeedForwardBlock& b) {
    return b.experts->slices.size() == 1 && (b.shared == nullptr || b.shared->slices.size() == 1);
}

void run_in_team(std::span<const LayerHalf> halves, const AttentionBlockCall& call) {
    ThreadPool& pool = thread_pool();
    TeamStep step(halves, call, pool);
    pool.run([&](Team& team) { step.run(team); });
}

}  // namespace moesaic
