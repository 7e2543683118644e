// Attention over a key/value cache: grouped-query (GQA, MQA, MHA) and absorbed latent (MLA) in one form.
//
// Rows that share keys are flattened: row = token * group + head_in_group, so that the query heads of one KV head (all
// heads, for MLA) are rows of one matrix product and a key is read once for all of them. Softmax is computed in a
// streaming way over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
//
// This header knows no instruction set and no Python.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace moesaic {

enum class CacheType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum class MaskType : int32_t { kNone = 0, kBool = 1, kAdditive = 2 };

// Strides are in elements; the last dimension is contiguous.
struct Strides3 {
    int64_t batch, head, token;
};

// One term of the score: q . k over dim values. MLA has two (latent and rope), everything else has one.
struct ScorePart {
    const float* q;
    Strides3 q_stride;
    const void* k;
    Strides3 k_stride;
    int64_t dim;
};

// Sequences of different lengths whose keys lie in blocks of a pool, and whose queries follow each other.
struct KeyPages {
    const int32_t* tables;  // [sequences] rows of block numbers: entry i holds keys i * block_size and after
    int64_t table_stride;
    int64_t block_size;       // divides kAttentionKeyBlock, or is a multiple of it
    const int32_t* num_keys;  // [sequences], those of the queries included
    const int32_t* starts;    // [sequences + 1]: queries starts[s] to starts[s + 1] are the last of sequence s
};

struct AttentionArgs {
    ScorePart parts[2];
    int32_t num_parts;
    CacheType cache_type;
    const void* v;
    Strides3 v_stride;
    int64_t value_dim;
    float* out;
    Strides3 out_stride;

    int64_t batch, num_kv_heads, group;  // group: query heads per KV head
    int64_t num_queries, num_keys;

    float scale;
    float softcap;                 // 0: none; otherwise score = softcap * tanh(score / softcap)
    const int64_t* causal_offset;  // [batch]: query i sees keys up to causal_offset + i; null: all keys
    int64_t causal_offset_stride;  // 0: one offset for all batch rows
    int64_t sliding_window;        // 0: none; otherwise only the last sliding_window of those keys
    const float* sinks;            // [heads] or null: a logit that takes part in the softmax and has no value

    MaskType mask_type;
    const void* mask;      // uint8 (nonzero: visible) or float (added to the score)
    Strides3 mask_stride;  // token: stride of a query row

    // Not null: batch counts sequences, their queries are causal, strides called batch are those between blocks for
    // keys and values and unused for queries and out; num_queries, num_keys, causal_offset and mask are not used.
    const KeyPages* pages;
};

// A piece of work: some rows of one (batch row, KV head) against a range of keys.
struct AttentionTask {
    int64_t batch, kv_head;
    int64_t row_begin, num_rows;
    int64_t key_begin, key_end;
};

// The unnormalised result of a task. With the results of other key ranges it can be merged exactly.
struct AttentionPartial {
    float* max;  // [num_rows] largest score
    float* sum;  // [num_rows] sum of exp(score - max)
    float* acc;  // [num_rows][padded(value_dim)] sum of exp(score - max) * v
};

constexpr int64_t kAttentionKeyBlock = 64;  // keys between two updates of the running maximum, at most
constexpr int64_t kTileKeys = 256;          // the same by tiles, exactly, counted from a task's first key

// Vectors have 16 lanes; buffers of our own are padded to whole vectors so that no loop needs a tail.
static constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

static inline int64_t score_depth(const AttentionArgs& a) {
    int64_t depth = 0;
    for (int p = 0; p < a.num_parts; ++p) depth += padded(a.parts[p].dim);
    return depth;
}

static inline int64_t num_queries_of(const AttentionArgs& a, int64_t batch) {
    return a.pages == nullptr ? a.num_queries : a.pages->starts[batch + 1] - a.pages->starts[batch];
}

// Where the query `token` of a batch row (a sequence, with pages) lies in a tensor of queries or results.
static inline int64_t query_offset(const AttentionArgs& a, const Strides3& s, int64_t batch, int64_t token) {
    if (a.pages == nullptr) return batch * s.batch + token * s.token;
    return (a.pages->starts[batch] + token) * s.token;
}

// Where a key or value lies; those that follow it up to the end of its block (all, without pages) are s.token apart.
static inline int64_t key_offset(const AttentionArgs& a, const Strides3& s, int64_t batch, int64_t key) {
    if (a.pages == nullptr) return batch * s.batch + key * s.token;
    const int64_t block = a.pages->tables[batch * a.pages->table_stride + key / a.pages->block_size];
    return block * s.batch + key % a.pages->block_size * s.token;
}

// Keys between two updates of the running maximum; with pages, all of one block.
static inline int64_t key_step(const AttentionArgs& a) {
    const bool small = a.pages != nullptr && a.pages->block_size < kAttentionKeyBlock;
    return small ? a.pages->block_size : kAttentionKeyBlock;
}

// Keys [begin, end) that the query `token` may see before the mask is looked at.
struct KeyRange {
    int64_t begin, end;
};

static inline KeyRange visible_keys(const AttentionArgs& a, int64_t batch, int64_t token) {
    if (a.pages == nullptr && a.causal_offset == nullptr) return {0, a.num_keys};
    const int64_t num_keys = a.pages == nullptr ? a.num_keys : a.pages->num_keys[batch];
    const int64_t offset =
        a.pages == nullptr ? a.causal_offset[batch * a.causal_offset_stride] : num_keys - num_queries_of(a, batch);
    const int64_t last = offset + token;
    const int64_t end = last < 0 ? 0 : (last >= num_keys ? num_keys : last + 1);
    int64_t begin = a.sliding_window > 0 ? last + 1 - a.sliding_window : 0;
    begin = begin < 0 ? 0 : (begin > end ? end : begin);
    return {begin, end};
}

struct AttentionKernels {
    // Scratch that one call of partial() needs for so many rows, in floats.
    int64_t (*scratch_floats)(const AttentionArgs& a, int64_t num_rows);
    // Computes the partial result of a task. scratch is 64-byte aligned.
    void (*partial)(const AttentionArgs& a, const AttentionTask& task, float* scratch, const AttentionPartial& result);
    // into = what `into` and `from` are together, of num_rows rows. A row of `from` that saw no key changes nothing.
    void (*fold)(const AttentionArgs& a, int64_t num_rows, const AttentionPartial& into, const AttentionPartial& from);
    // Merges the partial results of a task's rows over all key ranges, adds the sinks, divides, writes a.out.
    void (*finish)(const AttentionArgs& a, const AttentionTask& task, const AttentionPartial* partials, int64_t count);
    // The same as the first two by tiles; null where there are none.
    int64_t (*tile_scratch_floats)(const AttentionArgs& a, int64_t num_rows);
    void (*tile_partial)(const AttentionArgs& a, const AttentionTask& task, float* scratch,
                         const AttentionPartial& result);
};
MOESAIC_DECLARE_KERNELS(AttentionKernels, attention_kernels)

// Whether a batch row with so many queries goes by tiles: parts of prompts on a bfloat16 cache without a mask, unless
// the calling thread wants independent_rows(). Single tokens, and the few that remain of a prompt, never do.
bool goes_by_tiles(const AttentionArgs& a, int64_t num_queries);

// Rows of a task: many, because what they share is prepared for each task anew, but few enough for about `num_tasks`
// tasks out of `num_rows` rows.
int64_t rows_of_task(const AttentionArgs& a, bool by_tiles, int64_t num_rows, int64_t num_tasks);

// Computes a.out for all batch rows, heads and queries, on the thread pool.
void attention(const AttentionArgs& a);

// The same for a.pages != null, where attention() goes. What a query gets depends on its own sequence alone, to the
// bit: neither on the other sequences, nor on how many of its tokens are computed at once (but for whether these go by
// tiles), nor on threads.
void paged_attention(const AttentionArgs& a);

}  // namespace moesaic
