// A program that exits with 0 if work is divided as it should be: every item once, and no thread with much more than
// the others, counted in rows rather than timed; run by test_native.py and make sanitize.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <set>
#include <tuple>
#include <vector>

#include "moe_items.h"
#include "thread_pool.h"
#include "work_queue.h"

namespace {

using moesaic::WorkGroup;
using moesaic::WorkQueue;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

std::vector<std::int64_t> sizes_of_shares(const WorkQueue& queue, int num_threads) {
    std::vector<std::int64_t> sizes;
    for (int t = 0; t < num_threads; ++t) sizes.push_back(queue.share(t).end - queue.share(t).begin);
    return sizes;
}

// Largest share over the mean: what a phase takes over what it would with perfect balance.
double imbalance(std::int64_t num_items, int num_threads) {
    const auto sizes = sizes_of_shares(WorkQueue(num_items, num_threads), num_threads);
    require(std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0}) == num_items, "shares hold all items");
    return static_cast<double>(*std::max_element(sizes.begin(), sizes.end())) * num_threads /
           static_cast<double>(num_items);
}

// What csrc/moe.cpp makes of one token: gate and up in items of 32 rows of an expert, two thirds of the bytes, and down
// in items of 16 rows of the output. The two phases are apart, so their losses add up.
double loss(std::int64_t hidden, std::int64_t intermediate, std::int64_t num_experts, int num_threads) {
    const double inner = imbalance(num_experts * ((intermediate + 31) / 32), num_threads);
    const double outer = imbalance((hidden + 15) / 16, num_threads);
    return 2.0 / 3.0 * inner + 1.0 / 3.0 * outer - 1.0;
}

void decode_is_balanced() {
    struct Dims {
        std::int64_t hidden, intermediate, num_experts;
    };
    const Dims models[] = {
        {2048, 768, 8},   // Qwen3-30B-A3B
        {2048, 512, 10},  // Qwen3-Next-80B-A3B
        {7168, 2048, 8},  // DeepSeek-V3
        {2048, 1408, 6},  // DeepSeek-V2-Lite
        {2880, 2880, 4},  // gpt-oss
        {4096, 1536, 8},  // GLM-4.5, Qwen3-235B-A22B
        {3072, 1536, 8},  // MiniMax-M2
    };
    for (const Dims& d : models) {
        for (const int num_threads : {2, 6, 8, 12, 16, 24, 32}) {
            require(loss(d.hidden, d.intermediate, d.num_experts, num_threads) <= 0.10, "at most 10% lost");
        }
    }
    require(loss(2048, 768, 8, 16) == 0.0 && loss(2048, 512, 10, 16) == 0.0, "nothing lost on 16 threads");
}

// The less a thread has left, the less it takes; who has nothing takes of others, at most half. Every item once.
void parts_become_smaller() {
    WorkQueue queue(128, 2);
    std::vector<int> taken(128, 0);
    std::vector<std::int64_t> sizes;
    for (WorkQueue::Range range; queue.next_part(0, 4, 2, 8, range);) {
        for (std::int64_t i = range.begin; i < range.end; ++i) ++taken[static_cast<std::size_t>(i)];
        if (range.end <= 64) sizes.push_back(range.end - range.begin);
    }
    require(std::all_of(taken.begin(), taken.end(), [](int times) { return times == 1; }), "every item once");
    require(sizes.front() == 8 && sizes.back() == 2, "eight at first, two at last");
    require(std::is_sorted(sizes.rbegin(), sizes.rend()), "never more than before");
}

void groups_join_parts_and_nodes() {
    const auto check = [](std::vector<std::int64_t> items, std::vector<int> threads, std::vector<WorkGroup> expected) {
        const auto groups = moesaic::group_work(items, threads);
        require(groups.size() == expected.size(), "as many groups as there are parts and nodes");
        for (std::size_t g = 0; g < groups.size(); ++g) {
            require(groups[g].num_items == expected[g].num_items, "items of a group");
            require(groups[g].num_threads == expected[g].num_threads, "threads of a group");
        }
    };
    check({100}, {8}, {{100, 8}});
    check({100}, {8, 8}, {{100, 16}});
    check({64, 32}, {8, 8}, {{64, 8}, {32, 8}});
    check({64, 32}, {3, 1}, {{64, 3}, {32, 1}});
    check({10, 20, 30}, {4, 4}, {{30, 8 / 2}, {30, 4}});
    check({10, 20}, {2, 2, 2}, {{10, 4}, {20, 2}});
}

void own_group_first() {
    const WorkGroup groups[] = {{4, 2}, {0, 1}, {6, 2}};
    WorkQueue queue(groups);
    require(
        queue.share(0).begin == 0 && queue.share(1).end == 4 && queue.share(3).begin == 4 && queue.share(4).end == 10,
        "shares follow each other");
    for (int i = 0; i < 6; ++i) require(queue.next(3) >= 4, "a thread empties its own group first");
    for (int i = 0; i < 4; ++i) {
        const auto item = queue.next(3);
        require(item >= 0 && item < 4, "then it helps the others");
    }
    for (int t = 0; t < 5; ++t) require(queue.next(t) == -1, "all are taken");
}

void ranges_are_short_at_the_end_of_a_share() {
    WorkQueue queue(10, 2);
    WorkQueue::Range range;
    require(queue.next(0, 2, range) && range.begin == 0 && range.end == 2, "two from the front");
    require(queue.next(0, 2, range) && queue.next(0, 2, range) && range.begin == 4 && range.end == 5, "what is left");
    require(queue.next(0, 2, range) && range.begin == 8 && range.end == 10, "two from the end of another's five");
    require(queue.next(0, 2, range) && range.begin == 6 && range.end == 8, "half of three, rounded up");
    require(queue.next(0, 2, range) && range.begin == 5 && range.end == 6 && !queue.next(0, 2, range), "the last one");
}

void every_item_once_under_contention(int num_threads, std::int64_t num_items, int most) {
    moesaic::ThreadPool pool(num_threads);
    for (int round = 0; round < 200; ++round) {
        std::vector<std::atomic<int>> counts(static_cast<std::size_t>(num_items));
        const WorkGroup groups[] = {{num_items / 3, 1}, {num_items - num_items / 3, num_threads - 1}};
        WorkQueue queue(groups);
        pool.run([&](moesaic::Team& team) {
            for (WorkQueue::Range range; queue.next(team.thread(), most, range);) {
                for (auto i = range.begin; i < range.end; ++i) counts[static_cast<std::size_t>(i)]++;
            }
        });
        for (const auto& count : counts) require(count == 1, "every item is taken once");
    }
}

// One queue for stretch after stretch of a team that meets in between, each with another number of items.
void a_team_gives_itself_shares(int num_threads, std::int64_t most_items) {
    moesaic::ThreadPool pool(num_threads);
    std::vector<std::atomic<int>> counts(static_cast<std::size_t>(most_items));
    const WorkGroup groups[] = {{0, num_threads}};
    WorkQueue queue(groups);
    constexpr int kStretches = 300;
    pool.run([&](moesaic::Team& team) {
        for (int stretch = 0; stretch < kStretches; ++stretch) {
            const std::int64_t n = most_items - stretch % 7, t = team.thread();
            queue.give(team.thread(), n * t / num_threads, n * (t + 1) / num_threads);
            for (WorkQueue::Range range; queue.next(team.thread(), 1 + stretch % 2, range);) {
                for (auto i = range.begin; i < range.end; ++i) counts[static_cast<std::size_t>(i)]++;
            }
            int polls = 0;
            auto idle = [&] { ++polls; };
            team.barrier(idle);
        }
    });
    for (std::int64_t i = 0; i < most_items; ++i) {
        int expected = 0;
        for (int stretch = 0; stretch < kStretches; ++stretch) expected += i < most_items - stretch % 7;
        require(counts[static_cast<std::size_t>(i)] == expected, "every item once in every stretch");
    }
}

// Every pair of every slice of every expert belongs to one item, and where experts were read ahead, those pairs come
// first in a thread's share that it read, in the order in which it read them.
void items_are_divided(int num_experts, const std::vector<std::int64_t>& pairs, const std::vector<std::int64_t>& ready,
                       const std::vector<int>& threads) {
    moesaic::InnerItems items(pairs, num_experts, ready, threads);
    const std::int64_t per_expert = std::accumulate(pairs.begin(), pairs.end(), std::int64_t{0});
    require(items.count() == per_expert * num_experts, "as many items as pairs");
    std::set<std::tuple<std::size_t, std::int64_t, std::int64_t>> seen;
    for (std::int64_t item = 0; item < items.count(); ++item) {
        const moesaic::ItemRun& run = items.run_of(item);
        require(run.first <= item && item < run.end, "an item is in its run");
        const std::int64_t pair = run.pair_of(item);
        require(pair >= 0 && pair < pairs[run.slice] && run.expert < num_experts, "a pair that there is");
        require(seen.insert({run.slice, run.expert, pair}).second, "each pair once");
    }
    const int num_threads = std::accumulate(threads.begin(), threads.end(), 0);
    std::int64_t end = 0;
    for (int t = 0; t < num_threads; ++t) {
        const WorkQueue::Range share = items.queue().share(t);
        if (!ready.empty()) require(share.begin == end, "shares follow each other");
        end = share.end;
        std::int64_t item = share.begin;
        for (const std::int64_t expert : ready) {
            for (const moesaic::ItemRun& read : moesaic::pairs_to_read(pairs, threads, t)) {
                for (std::int64_t i = read.first; i < read.end; ++i, ++item) {
                    require(item < share.end, "what a thread read is in its share");
                    const moesaic::ItemRun& run = items.run_of(item);
                    require(run.expert == expert && run.slice == read.slice && run.pair_of(item) == read.pair_of(i),
                            "what a thread read comes first");
                }
            }
        }
    }
    require(end == items.count(), "shares hold all items");
}

void items_of_experts() {
    for (const std::vector<int>& threads : {std::vector<int>{1}, {3}, {16}, {4, 4}, {1, 2}}) {
        for (const std::vector<std::int64_t>& pairs : {std::vector<std::int64_t>{64}, {24, 24}, {5, 0, 3}, {1}}) {
            items_are_divided(8, pairs, {}, threads);
            items_are_divided(8, pairs, {3}, threads);
            items_are_divided(8, pairs, {7, 0}, threads);
            items_are_divided(2, pairs, {1, 0}, threads);
        }
    }
}

}  // namespace

int main() {
    parts_become_smaller();
    decode_is_balanced();
    groups_join_parts_and_nodes();
    own_group_first();
    items_of_experts();
    ranges_are_short_at_the_end_of_a_share();
    every_item_once_under_contention(4, 1000, 1);
    every_item_once_under_contention(5, 1001, 2);
    a_team_gives_itself_shares(4, 50);
    a_team_gives_itself_shares(1, 9);
    return 0;
}
