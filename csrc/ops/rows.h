// Splitting light work over rows: small work stays on the calling thread, which is faster than waking the team.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_pool.h"

namespace moesaic {

// Floats that one thread handles in about the time that starting the team takes.
constexpr int64_t kFloatsPerChunk = 32768;

// body(begin, end) over num_rows rows of about `floats_per_row` floats each.
template <class Body>
void for_rows(int64_t num_rows, int64_t floats_per_row, Body&& body) {
    const int64_t rows_per_chunk = std::max<int64_t>(1, kFloatsPerChunk / std::max<int64_t>(1, floats_per_row));
    if (num_rows <= rows_per_chunk) {
        body(int64_t{0}, num_rows);
    } else {  // once the team runs, all of it may as well help
        ThreadPool& pool = thread_pool();
        const int64_t share = (num_rows + pool.num_threads() - 1) / pool.num_threads();
        pool.parallel_for(num_rows, std::min(rows_per_chunk, share), body);
    }
}

}  // namespace moesaic
