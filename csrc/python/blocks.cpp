// Bindings of csrc/blocks.h: blocks are described once, with addresses that stay valid as long as the Python side keeps
// the tensors, and then called with what changes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "blocks.h"
#include "decoder_stack.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Address = std::uintptr_t;
// (format, weights_ptr, rows, cols, bias_ptr); weights_ptr 0: there is no such matrix.
using MatrixTuple = std::tuple<int, Address, std::int64_t, std::int64_t, Address>;
using NormTuple = std::tuple<Address, float>;  // (weight_ptr, eps)

PackedMatrix matrix_of(const MatrixTuple& t) {
    const auto& [format, weights, rows, cols, bias] = t;
    if (weights == 0) return {};
    check_matrix(format_info(format), rows, cols);
    return {&format_info(format), as_pointer<const std::uint8_t>(weights), rows, cols, as_pointer<const float>(bias)};
}

NormWeight norm_of(const NormTuple& t) { return {as_pointer<const float>(std::get<0>(t)), std::get<1>(t)}; }

Strides3 strides_of(const nb::tuple& t) {
    return {nb::cast<std::int64_t>(t[0]), nb::cast<std::int64_t>(t[1]), nb::cast<std::int64_t>(t[2])};
}

// (keys_ptr, key_strides, values_ptr, value_strides)
using CacheTuple = std::tuple<Address, nb::tuple, Address, nb::tuple>;

KeyValueCache cache_of(const CacheTuple& t, int type, std::int64_t num_past) {
    const auto& [keys, key_strides, values, value_strides] = t;
    return {as_pointer<void>(keys),
            strides_of(key_strides),
            as_pointer<void>(values),
            strides_of(value_strides),
            static_cast<CacheType>(type),
            num_past,
            0};
}

// A call but for its cache.
AttentionBlockCall call_of(Address x, std::int64_t batch, std::int64_t num_tokens, Address cos, Address sin,
                           const nb::tuple& angle_strides, int mask_type, Address mask, const nb::tuple& mask_strides,
                           Address out) {
    AttentionBlockCall call{};
    call.x = as_pointer<const float>(x);
    call.batch = batch;
    call.num_tokens = num_tokens;
    call.cos = as_pointer<const float>(cos);
    call.sin = as_pointer<const float>(sin);
    call.angle_stride = strides_of(angle_strides);
    call.mask_type = static_cast<MaskType>(mask_type);
    call.mask = as_pointer<const void>(mask);
    call.mask_stride = strides_of(mask_strides);
    call.out = as_pointer<float>(out);
    return call;
}

// __call__ of both kinds of attention.
template <class Block, void (*kForward)(const Block&, const AttentionBlockCall&)>
void bind_call(nb::class_<Block>& block) {
    block.def(
        "__call__",
        [](const Block& self, Address x_ptr, std::int64_t batch, std::int64_t num_tokens, Address cos_ptr,
           Address sin_ptr, const nb::tuple& angle_strides, const CacheTuple& cache, int cache_type,
           std::int64_t num_past, int mask_type, Address mask_ptr, const nb::tuple& mask_strides, Address out_ptr) {
            AttentionBlockCall call = call_of(x_ptr, batch, num_tokens, cos_ptr, sin_ptr, angle_strides, mask_type,
                                              mask_ptr, mask_strides, out_ptr);
            call.cache = cache_of(cache, cache_type, num_past);
            ReleaseGil release;
            kForward(self, call);
        },
        "x_ptr"_a, "batch"_a, "num_tokens"_a, "cos_ptr"_a, "sin_ptr"_a, "angle_strides"_a, "cache"_a, "cache_type"_a,
        "num_past"_a, "mask_type"_a, "mask_ptr"_a, "mask_strides"_a, "out_ptr"_a,
        "out = x + residual_scale * attention of x; appends to the cache (keys_ptr, key_strides, values_ptr, "
        "value_strides) behind its num_past tokens.");
}

// (format, weights_ptr, rows, cols, matrix_bytes, row_step, first_row, num_rows), one such matrix per head.
using HeadsTuple =
    std::tuple<int, Address, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

HeadMatrices heads_of(const HeadsTuple& t, std::int64_t num_heads) {
    const auto& [format, weights, rows, cols, matrix_bytes, row_step, first_row, num_rows] = t;
    check_matrix(format_info(format), rows, cols);
    return {&format_info(format),
            rows,
            cols,
            as_pointer<const std::uint8_t>(weights),
            matrix_bytes,
            row_step,
            num_heads,
            first_row,
            num_rows};
}

void bind_attention_block(nb::module_& m) {
    nb::class_<AttentionBlock> block(m, "AttentionBlock",
                                     "Norm, projections, rotary embedding, attention and residual.");
    block.def(
        "__init__",
        [](AttentionBlock* self, const NormTuple& norm, const MatrixTuple& q, const MatrixTuple& k,
           const MatrixTuple& v, const MatrixTuple& o, std::int64_t num_heads, std::int64_t num_kv_heads,
           std::int64_t head_dim, int head_norm, const NormTuple& q_norm, const NormTuple& k_norm, int rope_layout,
           std::int64_t num_pairs, float scale, Address sinks_ptr, float residual_scale) {
            new (self) AttentionBlock{norm_of(norm),   matrix_of(q),    matrix_of(k),
                                      matrix_of(v),    matrix_of(o),    num_heads,
                                      num_kv_heads,    head_dim,        static_cast<HeadNorm>(head_norm),
                                      norm_of(q_norm), norm_of(k_norm), static_cast<RopeLayout>(rope_layout),
                                      num_pairs,       scale,           as_pointer<const float>(sinks_ptr),
                                      residual_scale};
        },
        "norm"_a, "q"_a, "k"_a, "v"_a, "o"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "head_norm"_a, "q_norm"_a,
        "k_norm"_a, "rope_layout"_a, "num_pairs"_a, "scale"_a, "sinks_ptr"_a, "residual_scale"_a);
    bind_call<AttentionBlock, attention_block>(block);
}

void bind_latent_attention_block(nb::module_& m) {
    nb::class_<LatentAttentionBlock> block(m, "LatentAttentionBlock", "Multi-head latent attention, absorbed.");
    block.def(
        "__init__",
        [](LatentAttentionBlock* self, const NormTuple& norm, const MatrixTuple& q_a, const NormTuple& q_a_norm,
           const MatrixTuple& q_b, const MatrixTuple& kv_a, const NormTuple& kv_a_norm, const MatrixTuple& o,
           const HeadsTuple& k_b, bool k_b_transposed, const HeadsTuple& v_b, std::int64_t num_heads,
           std::int64_t nope_dim, std::int64_t rope_dim, std::int64_t latent_dim, std::int64_t value_dim,
           int rope_layout, float scale, float residual_scale) {
            auto* b = new (self) LatentAttentionBlock{};
            b->norm = norm_of(norm);
            b->q_a = matrix_of(q_a);
            b->q_a_norm = norm_of(q_a_norm);
            b->q_b = matrix_of(q_b);
            b->kv_a = matrix_of(kv_a);
            b->kv_a_norm = norm_of(kv_a_norm);
            b->o = matrix_of(o);
            b->k_b = heads_of(k_b, num_heads);
            b->k_b_transposed = k_b_transposed;
            b->v_b = heads_of(v_b, num_heads);
            b->num_heads = num_heads;
            b->nope_dim = nope_dim;
            b->rope_dim = rope_dim;
            b->latent_dim = latent_dim;
            b->value_dim = value_dim;
            b->rope_layout = static_cast<RopeLayout>(rope_layout);
            b->scale = scale;
            b->residual_scale = residual_scale;
        },
        "norm"_a, "q_a"_a, "q_a_norm"_a, "q_b"_a, "kv_a"_a, "kv_a_norm"_a, "o"_a, "k_b"_a, "k_b_transposed"_a, "v_b"_a,
        "num_heads"_a, "nope_dim"_a, "rope_dim"_a, "latent_dim"_a, "value_dim"_a, "rope_layout"_a, "scale"_a,
        "residual_scale"_a);
    bind_call<LatentAttentionBlock, latent_attention_block>(block);
}

void bind_feed_forward_block(nb::module_& m) {
    nb::class_<FeedForwardBlock>(m, "FeedForwardBlock", "Norm, router, experts, shared experts and residual.")
        .def(
            "__init__",
            [](FeedForwardBlock* self, const NormTuple& norm, const MatrixTuple& router, std::int64_t top_k, int score,
               Address bias_ptr, int group_score, std::int64_t num_groups, std::int64_t topk_groups, bool normalize,
               float sum_offset, float sum_minimum, float scale, const Experts& experts, const Experts* shared,
               const MatrixTuple& shared_gate, float residual_scale) {
                RouteArgs routing{};
                routing.top_k = top_k;
                routing.score = static_cast<RouteScore>(score);
                routing.bias = as_pointer<const float>(bias_ptr);
                routing.group_score = static_cast<GroupScore>(group_score);
                routing.num_groups = num_groups;
                routing.topk_groups = topk_groups;
                routing.normalize = normalize;
                routing.sum_offset = sum_offset;
                routing.sum_minimum = sum_minimum;
                routing.scale = scale;
                new (self) FeedForwardBlock{norm_of(norm), matrix_of(router),      routing,       &experts,
                                            shared,        matrix_of(shared_gate), residual_scale};
            },
            "norm"_a, "router"_a, "top_k"_a, "score"_a, "bias_ptr"_a, "group_score"_a, "num_groups"_a, "topk_groups"_a,
            "normalize"_a, "sum_offset"_a, "sum_minimum"_a, "scale"_a, "experts"_a, "shared"_a.none(), "shared_gate"_a,
            "residual_scale"_a, nb::keep_alive<1, 14>(), nb::keep_alive<1, 15>())
        .def(
            "__call__",
            [](const FeedForwardBlock& self, Address x_ptr, std::int64_t num_tokens) {
                ReleaseGil release;
                feed_forward_block(self, as_pointer<float>(x_ptr), num_tokens);
            },
            "x_ptr"_a, "num_tokens"_a, "x += residual_scale * feed-forward of x, in place.");
}

void bind_decoder_stack(nb::module_& m) {
    nb::class_<DecoderStack>(m, "DecoderStack", "Decoder layers one after the other.")
        .def(
            "__init__",
            [](DecoderStack* self, const std::vector<std::tuple<nb::object, const FeedForwardBlock*>>& blocks) {
                auto* stack = new (self) DecoderStack;
                for (const auto& [attention, feed_forward] : blocks) {
                    const bool latent = nb::isinstance<LatentAttentionBlock>(attention);
                    stack->layers.push_back({latent ? nullptr : nb::cast<const AttentionBlock*>(attention),
                                             latent ? nb::cast<const LatentAttentionBlock*>(attention) : nullptr,
                                             feed_forward});
                }
            },
            "blocks"_a, "blocks: (attention, feed_forward) of each layer, which the caller keeps alive.")
        .def(
            "__call__",
            [](const DecoderStack& self, Address x_ptr, std::int64_t batch, std::int64_t num_tokens, Address cos_ptr,
               Address sin_ptr, const nb::tuple& angle_strides, const std::vector<CacheTuple>& caches, int cache_type,
               std::int64_t num_past, int mask_type, Address mask_ptr, const nb::tuple& mask_strides,
               Address even_out_ptr, Address odd_out_ptr) {
                if (caches.size() != self.layers.size()) throw nb::value_error("a cache for each layer");
                const AttentionBlockCall call = call_of(x_ptr, batch, num_tokens, cos_ptr, sin_ptr, angle_strides,
                                                        mask_type, mask_ptr, mask_strides, even_out_ptr);
                std::vector<KeyValueCache> of_layers;
                for (const CacheTuple& cache : caches) of_layers.push_back(cache_of(cache, cache_type, num_past));
                float* outputs[2] = {as_pointer<float>(even_out_ptr), as_pointer<float>(odd_out_ptr)};
                ReleaseGil release;
                self.run(call, of_layers, outputs);
            },
            "x_ptr"_a, "batch"_a, "num_tokens"_a, "cos_ptr"_a, "sin_ptr"_a, "angle_strides"_a, "caches"_a,
            "cache_type"_a, "num_past"_a, "mask_type"_a, "mask_ptr"_a, "mask_strides"_a, "even_out_ptr"_a,
            "odd_out_ptr"_a,
            "All layers; x stays as it is. Layers with even numbers write to even_out, so the result is in even_out if "
            "their number is odd.");
}

}  // namespace

void bind_blocks(nb::module_& m) {
    bind_attention_block(m);
    bind_latent_attention_block(m);
    bind_feed_forward_block(m);
    bind_decoder_stack(m);
}

}  // namespace moesaic
