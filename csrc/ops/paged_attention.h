// Attention over pages cut into tasks, for a team of threads that is there already. paged_attention() of attention.h
// brings its own.
#pragma once

#include <cstdint>
#include <memory>

#include "ops/attention.h"

namespace moesaic {

class PagedTasks {
  public:
    // What is read of `a` are its pages, the numbers of heads and rows, dimensions and window.
    PagedTasks(const AttentionArgs& a, int64_t num_threads);
    ~PagedTasks();
    PagedTasks(PagedTasks&&) noexcept;

    int64_t size() const;
    int64_t kv_head(int64_t index) const;
    // Whether a task looks at the last key of its sequence: all rows of a KV head have one that does.
    bool sees_last_key(int64_t index) const;
    // The keys that a task looks at.
    KeyRange keys(int64_t index) const;
    // One of them; `a` as it was given but for where tensors lie. When all have been run, they can be again.
    void run(const AttentionArgs& a, int64_t index);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace moesaic
