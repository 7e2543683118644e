// Bindings of what runs on a cache in pages: attention, and layers of a decoder. The Python side has checked shapes and
// types; what a step's tables and numbers say is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "decoder_stack.h"
#include "kernels/independent_rows.h"
#include "ops/attention.h"
#include "paged_model.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Address = std::uintptr_t;

Strides3 strides_of(const nb::tuple& t) {
    return {nb::cast<std::int64_t>(t[0]), nb::cast<std::int64_t>(t[1]), nb::cast<std::int64_t>(t[2])};
}

// (keys_ptr, key_strides, values_ptr, value_strides, window)
using PoolTuple = std::tuple<Address, nb::tuple, Address, nb::tuple, std::int64_t>;

KeyValueCache cache_of(const PoolTuple& t, int type) {
    const auto& [keys, key_strides, values, value_strides, window] = t;
    return {as_pointer<void>(keys),
            strides_of(key_strides),
            as_pointer<void>(values),
            strides_of(value_strides),
            static_cast<CacheType>(type),
            0,
            window};
}

// A step but for its slots and the size of blocks.
PagedStep step_of(Address tables, std::int64_t table_width, Address lengths, Address starts,
                  std::int64_t num_sequences) {
    PagedStep step{};
    step.pages.tables = as_pointer<const std::int32_t>(tables);
    step.pages.table_stride = table_width;
    step.pages.num_keys = as_pointer<const std::int32_t>(lengths);
    step.pages.starts = as_pointer<const std::int32_t>(starts);
    step.num_sequences = num_sequences;
    return step;
}

// (q_ptr, q_strides, k_ptr, k_strides, dim) of a term of the score; dim 0: absent.
using PartTuple = std::tuple<Address, nb::tuple, Address, nb::tuple, std::int64_t>;

ScorePart part_of(const PartTuple& t) {
    const auto& [q, q_strides, k, k_strides, dim] = t;
    return {as_pointer<const float>(q), strides_of(q_strides), as_pointer<const void>(k), strides_of(k_strides), dim};
}

void bind_paged_attention(nb::module_& m) {
    m.def(
        "paged_attention",
        [](const PartTuple& first, const PartTuple& second, Address v_ptr, const nb::tuple& v_strides,
           std::int64_t value_dim, int cache_type, Address out_ptr, const nb::tuple& out_strides,
           std::int64_t num_tokens, std::int64_t num_kv_heads, std::int64_t group, Address tables_ptr,
           std::int64_t table_width, Address lengths_ptr, Address starts_ptr, std::int64_t num_sequences,
           std::int64_t block_size, std::int64_t num_blocks, float scale, float softcap, std::int64_t sliding_window,
           Address sinks_ptr) {
            PagedStep step = step_of(tables_ptr, table_width, lengths_ptr, starts_ptr, num_sequences);
            step.pages.block_size = block_size;
            check_paged_step(step, num_tokens, table_width, num_blocks);
            AttentionArgs a{};
            a.parts[0] = part_of(first);
            a.parts[1] = part_of(second);
            a.num_parts = a.parts[1].dim > 0 ? 2 : 1;
            a.cache_type = static_cast<CacheType>(cache_type);
            a.v = as_pointer<const void>(v_ptr);
            a.v_stride = strides_of(v_strides);
            a.value_dim = value_dim;
            a.out = as_pointer<float>(out_ptr);
            a.out_stride = strides_of(out_strides);
            a.batch = num_sequences;
            a.num_kv_heads = num_kv_heads;
            a.group = group;
            a.scale = scale;
            a.softcap = softcap;
            a.sliding_window = sliding_window;
            a.sinks = as_pointer<const float>(sinks_ptr);
            a.pages = &step.pages;
            ReleaseGil release;
            attention(a);
        },
        "first"_a, "second"_a, "v_ptr"_a, "v_strides"_a, "value_dim"_a, "cache_type"_a, "out_ptr"_a, "out_strides"_a,
        "num_tokens"_a, "num_kv_heads"_a, "group"_a, "tables_ptr"_a, "table_width"_a, "lengths_ptr"_a, "starts_ptr"_a,
        "num_sequences"_a, "block_size"_a, "num_blocks"_a, "scale"_a, "softcap"_a, "sliding_window"_a, "sinks_ptr"_a,
        "Causal attention of the last tokens of sequences over blocks of a pool. first, second: (q_ptr, q_strides, "
        "k_ptr, k_strides, dim) of the score's terms, dim 0: absent; strides of (unused or block, head, token).");
}

// Where the tokens of a step are, and where their keys go.
struct StackTables {
    Address slots, tables;
    std::int64_t table_width;
    Address lengths, starts;
    std::int64_t num_sequences;
};

PagedStep checked_step(const PagedStack& stack, const StackTables& t, std::int64_t num_tokens) {
    PagedStep step = step_of(t.tables, t.table_width, t.lengths, t.starts, t.num_sequences);
    step.pages.block_size = stack.block_size;
    step.slots = as_pointer<const std::int64_t>(t.slots);
    check_paged_step(step, num_tokens, t.table_width, stack.num_blocks);
    return step;
}

struct StackTokens {
    Address x;
    std::int64_t count;
    Address cos, sin;
    std::int64_t num_pairs;
};

// `step` must outlive the call.
AttentionBlockCall stack_call(const PagedStep& step, const StackTokens& tokens, Address out) {
    AttentionBlockCall call{};
    call.x = as_pointer<const float>(tokens.x);
    call.out = as_pointer<float>(out);
    call.batch = 1;
    call.num_tokens = tokens.count;
    call.cos = as_pointer<const float>(tokens.cos);
    call.sin = as_pointer<const float>(tokens.sin);
    call.angle_stride = {0, tokens.num_pairs, 1};
    call.paged = &step;
    return call;
}

void bind_paged_stack(nb::module_& m) {
    nb::class_<PagedStack>(m, "PagedStack", "Decoder layers on a cache in pages.")
        .def(
            "__init__",
            [](PagedStack* self, const DecoderStack& stack, const std::vector<PoolTuple>& caches, int cache_type,
               std::int64_t block_size, std::int64_t num_blocks) {
                if (caches.size() != stack.layers.size()) throw nb::value_error("a cache for each layer");
                auto* paged = new (self) PagedStack{&stack, {}, block_size, num_blocks};
                for (const PoolTuple& cache : caches) paged->caches.push_back(cache_of(cache, cache_type));
            },
            "stack"_a, "caches"_a, "cache_type"_a, "block_size"_a, "num_blocks"_a, nb::keep_alive<1, 2>(),
            "caches: (keys_ptr, strides, values_ptr, strides, window) of each layer, strides of block, head and "
            "position; window 0: none.")
        .def(
            "__call__",
            [](const PagedStack& self, Address x_ptr, std::int64_t num_tokens, std::int64_t first, std::int64_t count,
               Address cos_ptr, Address sin_ptr, std::int64_t num_pairs, Address slots_ptr, Address tables_ptr,
               std::int64_t table_width, Address lengths_ptr, Address starts_ptr, std::int64_t num_sequences) {
                const StackTables tables{slots_ptr, tables_ptr, table_width, lengths_ptr, starts_ptr, num_sequences};
                const PagedStep step = checked_step(self, tables, num_tokens);
                const AttentionBlockCall call =
                    stack_call(step, {x_ptr, num_tokens, cos_ptr, sin_ptr, num_pairs}, x_ptr);
                ReleaseGil release;
                self.run(call, first, count);
            },
            "x_ptr"_a, "num_tokens"_a, "first"_a, "count"_a, "cos_ptr"_a, "sin_ptr"_a, "num_pairs"_a, "slots_ptr"_a,
            "tables_ptr"_a, "table_width"_a, "lengths_ptr"_a, "starts_ptr"_a, "num_sequences"_a,
            "Layers first to first + count - 1 on x [num_tokens, hidden], in place. ValueError if starts, lengths, "
            "tables or slots do not go together, or lead out of the pool.")
        .def(
            "finish",
            [](const PagedStack& self, Address x_ptr, std::int64_t num_tokens, Address cos_ptr, Address sin_ptr,
               std::int64_t num_pairs, Address slots_ptr, Address tables_ptr, std::int64_t table_width,
               Address lengths_ptr, Address starts_ptr, std::int64_t num_sequences, Address out_ptr) {
                const StackTables tables{slots_ptr, tables_ptr, table_width, lengths_ptr, starts_ptr, num_sequences};
                const PagedStep step = checked_step(self, tables, num_tokens);
                for (std::int64_t s = 0; s < num_sequences; ++s) {
                    if (step.pages.starts[s] == step.pages.starts[s + 1]) {
                        throw nb::value_error("a sequence has no token in the step, so it has no last one");
                    }
                }
                const AttentionBlockCall call =
                    stack_call(step, {x_ptr, num_tokens, cos_ptr, sin_ptr, num_pairs}, out_ptr);
                ReleaseGil release;
                self.finish(call);
            },
            "x_ptr"_a, "num_tokens"_a, "cos_ptr"_a, "sin_ptr"_a, "num_pairs"_a, "slots_ptr"_a, "tables_ptr"_a,
            "table_width"_a, "lengths_ptr"_a, "starts_ptr"_a, "num_sequences"_a, "out_ptr"_a,
            "The last layer for the last token of each sequence, into out [num_sequences, hidden]; the others leave "
            "keys and values. ValueError as for the call, or if a sequence has no token.");
}

// (format, weights_ptr, rows, cols, bias_ptr)
using MatrixTuple = std::tuple<int, Address, std::int64_t, std::int64_t, Address>;

PackedMatrix matrix_of(const MatrixTuple& t) {
    const auto& [format, weights, rows, cols, bias] = t;
    check_matrix(format_info(format), rows, cols);
    return {&format_info(format), as_pointer<const std::uint8_t>(weights), rows, cols, as_pointer<const float>(bias)};
}

void bind_paged_model(nb::module_& m) {
    nb::class_<PagedModel>(m, "PagedModel", "Decode steps of a whole model on a cache in pages.")
        .def(
            "__init__",
            [](PagedModel* self, const PagedStack& stack, const MatrixTuple& embedding, float embedding_scale,
               const std::tuple<Address, float>& norm, const MatrixTuple& head, float logit_scale, Address cos_ptr,
               Address sin_ptr, std::int64_t num_positions, std::int64_t num_pairs) {
                new (self) PagedModel{&stack,
                                      matrix_of(embedding),
                                      embedding_scale,
                                      {as_pointer<const float>(std::get<0>(norm)), std::get<1>(norm)},
                                      matrix_of(head),
                                      logit_scale,
                                      as_pointer<const float>(cos_ptr),
                                      as_pointer<const float>(sin_ptr),
                                      num_positions,
                                      num_pairs};
            },
            "stack"_a, "embedding"_a, "embedding_scale"_a, "norm"_a, "head"_a, "logit_scale"_a, "cos_ptr"_a,
            "sin_ptr"_a, "num_positions"_a, "num_pairs"_a, nb::keep_alive<1, 2>(),
            "norm: (weight_ptr, eps); cos and sin: [num_positions, num_pairs].")
        .def(
            "decode",
            [](const PagedModel& self, Address ids_ptr, Address positions_ptr, Address slots_ptr, Address tables_ptr,
               std::int64_t table_width, Address lengths_ptr, std::int64_t count, Address logits_ptr,
               bool independent) {
                const DecodeTokens tokens{as_pointer<const std::int64_t>(ids_ptr),
                                          as_pointer<const std::int64_t>(positions_ptr),
                                          as_pointer<const std::int64_t>(slots_ptr),
                                          as_pointer<const std::int32_t>(tables_ptr),
                                          table_width,
                                          as_pointer<const std::int32_t>(lengths_ptr),
                                          count};
                ReleaseGil release;
                const IndependentRows guard(independent);
                self.decode(tokens, as_pointer<float>(logits_ptr));
            },
            "ids_ptr"_a, "positions_ptr"_a, "slots_ptr"_a, "tables_ptr"_a, "table_width"_a, "lengths_ptr"_a, "count"_a,
            "logits_ptr"_a, "independent"_a,
            "logits [count, vocabulary] of one new token of each sequence. ValueError if tokens and tables do not go "
            "together or lead out of the pool, IndexError for an id outside the embedding.");
}

}  // namespace

void bind_paged(nb::module_& m) {
    m.attr("ATTENTION_KEY_BLOCK") = kAttentionKeyBlock;
    bind_paged_attention(m);
    bind_paged_stack(m);
    bind_paged_model(m);
}

}  // namespace moesaic
