// Bindings of csrc/ops. Arguments end in _ptr where they are integer addresses; *_strides are the stride tuples of
// torch tensors, in elements. The Python side (kernels/ops.py) has checked all of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "ops/attention.h"
#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/probe.h"
#include "ops/rotary.h"
#include "ops/route.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Address = std::uintptr_t;

// Strides of [batch, heads, tokens, dim].
Strides3 strides_of(const nb::tuple& t) {
    return {nb::cast<int64_t>(t[0]), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2])};
}

NormArgs norm_args(Address x_ptr, int64_t x_stride, Address weight_ptr, float eps, Address out_ptr, int64_t out_stride,
                   Address residual_ptr, int64_t residual_stride, float residual_scale, int64_t num_rows,
                   int64_t width) {
    NormArgs a{};
    a.x = as_pointer<const float>(x_ptr);
    a.x_stride = x_stride;
    a.residual = as_pointer<float>(residual_ptr);
    a.residual_stride = residual_stride;
    a.residual_scale = residual_scale;
    a.weight = as_pointer<const float>(weight_ptr);
    a.eps = eps;
    a.out = as_pointer<float>(out_ptr);
    a.out_stride = out_stride;
    a.num_rows = num_rows;
    a.width = width;
    return a;
}

void bind_norms(nb::module_& m) {
    m.def(
        "rms_norm",
        [](Address x_ptr, int64_t x_stride, Address weight_ptr, float weight_offset, float eps, Address out_ptr,
           int64_t out_stride, Address residual_ptr, int64_t residual_stride, float residual_scale, int64_t num_rows,
           int64_t width) {
            NormArgs a = norm_args(x_ptr, x_stride, weight_ptr, eps, out_ptr, out_stride, residual_ptr, residual_stride,
                                   residual_scale, num_rows, width);
            a.weight_offset = weight_offset;
            ReleaseGil release;
            rms_norm(a);
        },
        "x_ptr"_a, "x_stride"_a, "weight_ptr"_a, "weight_offset"_a, "eps"_a, "out_ptr"_a, "out_stride"_a,
        "residual_ptr"_a, "residual_stride"_a, "residual_scale"_a, "num_rows"_a, "width"_a,
        "out = rms_norm(x) * (weight + weight_offset); with a residual: residual += residual_scale * x comes first and "
        "is what is normalised. float32.");
    m.def(
        "layer_norm",
        [](Address x_ptr, int64_t x_stride, Address weight_ptr, Address bias_ptr, float eps, Address out_ptr,
           int64_t out_stride, int64_t num_rows, int64_t width) {
            NormArgs a = norm_args(x_ptr, x_stride, weight_ptr, eps, out_ptr, out_stride, 0, 0, 0.0f, num_rows, width);
            a.bias = as_pointer<const float>(bias_ptr);
            ReleaseGil release;
            layer_norm(a);
        },
        "x_ptr"_a, "x_stride"_a, "weight_ptr"_a, "bias_ptr"_a, "eps"_a, "out_ptr"_a, "out_stride"_a, "num_rows"_a,
        "width"_a, "out = layer_norm(x) * weight + bias; weight and bias may be 0 (absent). float32.");
}

void bind_rotary(nb::module_& m) {
    m.def(
        "norm_and_rotate",
        [](Address q_ptr, const nb::tuple& q_strides, int64_t num_heads, Address k_ptr, const nb::tuple& k_strides,
           int64_t num_kv_heads, int64_t batch, int64_t num_tokens, int64_t head_dim, Address cos_ptr, Address sin_ptr,
           const nb::tuple& angle_strides, int64_t num_pairs, int layout, int norm, Address q_weight_ptr,
           Address k_weight_ptr, float eps, float weight_offset) {
            RotaryArgs a{};
            a.q = {as_pointer<float>(q_ptr), strides_of(q_strides), num_heads, head_dim,
                   as_pointer<const float>(q_weight_ptr)};
            a.k = {as_pointer<float>(k_ptr), strides_of(k_strides), num_kv_heads, head_dim,
                   as_pointer<const float>(k_weight_ptr)};
            a.batch = batch;
            a.num_tokens = num_tokens;
            a.cos = as_pointer<const float>(cos_ptr);
            a.sin = as_pointer<const float>(sin_ptr);
            const Strides3 s = strides_of(angle_strides);  // [batch, tokens, pairs]
            a.angle_batch_stride = s.batch;
            a.angle_token_stride = s.head;
            a.angle_stride = s.token;
            a.num_pairs = num_pairs;
            a.layout = static_cast<RopeLayout>(layout);
            a.norm = static_cast<HeadNorm>(norm);
            a.eps = eps;
            a.weight_offset = weight_offset;
            ReleaseGil release;
            norm_and_rotate(a);
        },
        "q_ptr"_a, "q_strides"_a, "num_heads"_a, "k_ptr"_a, "k_strides"_a, "num_kv_heads"_a, "batch"_a, "num_tokens"_a,
        "head_dim"_a, "cos_ptr"_a, "sin_ptr"_a, "angle_strides"_a, "num_pairs"_a, "layout"_a, "norm"_a,
        "q_weight_ptr"_a, "k_weight_ptr"_a, "eps"_a, "weight_offset"_a,
        "Normalise and rotate the heads of q and k [batch, heads, tokens, head_dim] in place. float32.");
    nb::enum_<RopeLayout>(m, "RopeLayout", nb::is_arithmetic())
        .value("HALF", RopeLayout::kHalf)
        .value("INTERLEAVED", RopeLayout::kInterleaved)
        .value("INTERLEAVED_TO_HALF", RopeLayout::kInterleavedToHalf);
    nb::enum_<HeadNorm>(m, "HeadNorm", nb::is_arithmetic())
        .value("NONE", HeadNorm::kNone)
        .value("PER_HEAD", HeadNorm::kPerHead)
        .value("PER_HEAD_AFTER_ROPE", HeadNorm::kPerHeadAfterRope)
        .value("ALL_HEADS", HeadNorm::kAllHeads);
    m.attr("MAX_ROTARY_PAIRS") = kMaxRotaryPairs;
}

// What GQA and MLA have in common.
struct AttentionOptions {
    float scale, softcap;
    bool causal;
    int64_t causal_offset;      // of all batch rows
    Address causal_offset_ptr;  // or 0; [batch]
    int64_t sliding_window;
    Address sinks_ptr;
    int mask_type;
    Address mask_ptr;
};

// The options must outlive the arguments.
void set_options(AttentionArgs& a, const AttentionOptions& o, const nb::tuple& mask_strides) {
    a.scale = o.scale;
    a.softcap = o.softcap;
    if (o.causal) {
        a.causal_offset = o.causal_offset_ptr == 0 ? &o.causal_offset : as_pointer<const int64_t>(o.causal_offset_ptr);
        a.causal_offset_stride = o.causal_offset_ptr == 0 ? 0 : 1;
    }
    a.sliding_window = o.sliding_window;
    a.sinks = as_pointer<const float>(o.sinks_ptr);
    a.mask_type = static_cast<MaskType>(o.mask_type);
    a.mask = as_pointer<const void>(o.mask_ptr);
    a.mask_stride = strides_of(mask_strides);
}

void bind_attention(nb::module_& m) {
    m.def(
        "attention",
        [](Address q_ptr, const nb::tuple& q_strides, Address k_ptr, const nb::tuple& k_strides, Address v_ptr,
           const nb::tuple& v_strides, int cache_type, Address out_ptr, const nb::tuple& out_strides, int64_t batch,
           int64_t num_kv_heads, int64_t group, int64_t num_queries, int64_t num_keys, int64_t key_dim,
           int64_t value_dim, float scale, float softcap, bool causal, int64_t causal_offset, Address causal_offset_ptr,
           int64_t sliding_window, Address sinks_ptr, int mask_type, Address mask_ptr, const nb::tuple& mask_strides) {
            AttentionArgs a{};
            a.parts[0] = {as_pointer<const float>(q_ptr), strides_of(q_strides), as_pointer<const void>(k_ptr),
                          strides_of(k_strides), key_dim};
            a.num_parts = 1;
            a.cache_type = static_cast<CacheType>(cache_type);
            a.v = as_pointer<const void>(v_ptr);
            a.v_stride = strides_of(v_strides);
            a.value_dim = value_dim;
            a.out = as_pointer<float>(out_ptr);
            a.out_stride = strides_of(out_strides);
            a.batch = batch;
            a.num_kv_heads = num_kv_heads;
            a.group = group;
            a.num_queries = num_queries;
            a.num_keys = num_keys;
            const AttentionOptions options{scale,          softcap,   causal,    causal_offset, causal_offset_ptr,
                                           sliding_window, sinks_ptr, mask_type, mask_ptr};
            set_options(a, options, mask_strides);
            ReleaseGil release;
            attention(a);
        },
        "q_ptr"_a, "q_strides"_a, "k_ptr"_a, "k_strides"_a, "v_ptr"_a, "v_strides"_a, "cache_type"_a, "out_ptr"_a,
        "out_strides"_a, "batch"_a, "num_kv_heads"_a, "group"_a, "num_queries"_a, "num_keys"_a, "key_dim"_a,
        "value_dim"_a, "scale"_a, "softcap"_a, "causal"_a, "causal_offset"_a, "causal_offset_ptr"_a, "sliding_window"_a,
        "sinks_ptr"_a, "mask_type"_a, "mask_ptr"_a, "mask_strides"_a,
        "softmax(scale q k^T + mask) v over [batch, heads, tokens, dim]; group = heads / num_kv_heads.");
    nb::enum_<CacheType>(m, "CacheType", nb::is_arithmetic())
        .value("F32", CacheType::kF32)
        .value("BF16", CacheType::kBF16)
        .value("F16", CacheType::kF16);
    nb::enum_<MaskType>(m, "MaskType", nb::is_arithmetic())
        .value("NONE", MaskType::kNone)
        .value("BOOL", MaskType::kBool)
        .value("ADDITIVE", MaskType::kAdditive);
}

void bind_mla_attention(nb::module_& m) {
    m.def(
        "mla_attention",
        [](Address q_latent_ptr, const nb::tuple& q_latent_strides, Address q_rope_ptr, const nb::tuple& q_rope_strides,
           Address latent_ptr, const nb::tuple& latent_strides, Address rope_ptr, const nb::tuple& rope_strides,
           int cache_type, Address out_ptr, const nb::tuple& out_strides, int64_t batch, int64_t num_heads,
           int64_t num_queries, int64_t num_keys, int64_t latent_dim, int64_t rope_dim, float scale, float softcap,
           bool causal, int64_t causal_offset, Address causal_offset_ptr, int64_t sliding_window, Address sinks_ptr,
           int mask_type, Address mask_ptr, const nb::tuple& mask_strides) {
            AttentionArgs a{};
            a.parts[0] = {as_pointer<const float>(q_latent_ptr), strides_of(q_latent_strides),
                          as_pointer<const void>(latent_ptr), strides_of(latent_strides), latent_dim};
            a.parts[1] = {as_pointer<const float>(q_rope_ptr), strides_of(q_rope_strides),
                          as_pointer<const void>(rope_ptr), strides_of(rope_strides), rope_dim};
            a.num_parts = 2;
            a.cache_type = static_cast<CacheType>(cache_type);
            a.v = a.parts[0].k;
            a.v_stride = a.parts[0].k_stride;
            a.value_dim = latent_dim;
            a.out = as_pointer<float>(out_ptr);
            a.out_stride = strides_of(out_strides);
            a.batch = batch;
            a.num_kv_heads = 1;
            a.group = num_heads;
            a.num_queries = num_queries;
            a.num_keys = num_keys;
            const AttentionOptions options{scale,          softcap,   causal,    causal_offset, causal_offset_ptr,
                                           sliding_window, sinks_ptr, mask_type, mask_ptr};
            set_options(a, options, mask_strides);
            ReleaseGil release;
            attention(a);
        },
        "q_latent_ptr"_a, "q_latent_strides"_a, "q_rope_ptr"_a, "q_rope_strides"_a, "latent_ptr"_a, "latent_strides"_a,
        "rope_ptr"_a, "rope_strides"_a, "cache_type"_a, "out_ptr"_a, "out_strides"_a, "batch"_a, "num_heads"_a,
        "num_queries"_a, "num_keys"_a, "latent_dim"_a, "rope_dim"_a, "scale"_a, "softcap"_a, "causal"_a,
        "causal_offset"_a, "causal_offset_ptr"_a, "sliding_window"_a, "sinks_ptr"_a, "mask_type"_a, "mask_ptr"_a,
        "mask_strides"_a,
        "Absorbed multi-head latent attention: keys are (latent, rope), values are latent, one cache for all heads.");
}

void bind_route(nb::module_& m) {
    m.def(
        "route",
        [](Address logits_ptr, int64_t logits_stride, int64_t num_tokens, int64_t num_experts, int64_t top_k, int score,
           Address bias_ptr, int group_score, int64_t num_groups, int64_t topk_groups, bool normalize, float sum_offset,
           float sum_minimum, float scale, Address indices_ptr, Address weights_ptr) {
            RouteArgs a{};
            a.logits = as_pointer<const float>(logits_ptr);
            a.logits_stride = logits_stride;
            a.num_tokens = num_tokens;
            a.num_experts = num_experts;
            a.top_k = top_k;
            a.score = static_cast<RouteScore>(score);
            a.bias = as_pointer<const float>(bias_ptr);
            a.group_score = static_cast<GroupScore>(group_score);
            a.num_groups = num_groups;
            a.topk_groups = topk_groups;
            a.normalize = normalize;
            a.sum_offset = sum_offset;
            a.sum_minimum = sum_minimum;
            a.scale = scale;
            a.indices = as_pointer<int64_t>(indices_ptr);
            a.weights = as_pointer<float>(weights_ptr);
            ReleaseGil release;
            route(a);
        },
        "logits_ptr"_a, "logits_stride"_a, "num_tokens"_a, "num_experts"_a, "top_k"_a, "score"_a, "bias_ptr"_a,
        "group_score"_a, "num_groups"_a, "topk_groups"_a, "normalize"_a, "sum_offset"_a, "sum_minimum"_a, "scale"_a,
        "indices_ptr"_a, "weights_ptr"_a, "Experts and weights of each token from its router logits.");
    nb::enum_<RouteScore>(m, "RouteScore", nb::is_arithmetic())
        .value("SOFTMAX", RouteScore::kSoftmax)
        .value("SIGMOID", RouteScore::kSigmoid)
        .value("SOFTMAX_OF_CHOSEN", RouteScore::kSoftmaxOfChosen);
    nb::enum_<GroupScore>(m, "GroupScore", nb::is_arithmetic())
        .value("NONE", GroupScore::kNone)
        .value("SUM_OF_TWO", GroupScore::kSumOfTwo)
        .value("MAXIMUM", GroupScore::kMaximum);
    m.attr("MAX_ROUTE_EXPERTS") = kMaxRouteExperts;
}

void bind_elementwise(nb::module_& m) {
    m.def(
        "row_op",
        [](int op, Address x_ptr, int64_t x_stride, Address y_ptr, int64_t y_stride, Address out_ptr,
           int64_t out_stride, Address gate_ptr, float scale, int64_t num_rows, int64_t width) {
            const RowOpArgs a{static_cast<RowOp>(op),
                              as_pointer<const float>(x_ptr),
                              x_stride,
                              as_pointer<const float>(y_ptr),
                              y_stride,
                              as_pointer<float>(out_ptr),
                              out_stride,
                              as_pointer<const float>(gate_ptr),
                              scale,
                              num_rows,
                              width};
            ReleaseGil release;
            row_op(a);
        },
        "op"_a, "x_ptr"_a, "x_stride"_a, "y_ptr"_a, "y_stride"_a, "out_ptr"_a, "out_stride"_a, "gate_ptr"_a, "scale"_a,
        "num_rows"_a, "width"_a, "One elementwise operation over rows of float32; see RowOp.");
    m.def(
        "argmax",
        [](Address x_ptr, int64_t stride, int64_t num_rows, int64_t width, Address indices_ptr) {
            ReleaseGil release;
            argmax(as_pointer<const float>(x_ptr), stride, num_rows, width, as_pointer<int64_t>(indices_ptr));
        },
        "x_ptr"_a, "stride"_a, "num_rows"_a, "width"_a, "indices_ptr"_a, "Index of the largest value of each row.");
    nb::enum_<RowOp>(m, "RowOp", nb::is_arithmetic())
        .value("SILU_MUL", RowOp::kSiluMul)
        .value("GELU_MUL", RowOp::kGeluMul)
        .value("GELU_TANH_MUL", RowOp::kGeluTanhMul)
        .value("SIGMOID_MUL", RowOp::kSigmoidMul)
        .value("ADD_SCALED", RowOp::kAddScaled)
        .value("ADD_GATED", RowOp::kAddGated);
}

void bind_probes(nb::module_& m) {
    m.def(
        "read_bandwidth",
        [](int64_t num_bytes, double seconds) {
            ReleaseGil release;
            const Rates rates = read_bandwidth(num_bytes, seconds);
            return std::pair(rates.best, rates.median);
        },
        "num_bytes"_a, "seconds"_a, "Best and median GB/s at which all threads read memory of their own.");
    m.def(
        "peak_ops",
        [](int kind, double seconds) {
            ReleaseGil release;
            const Rates rates = peak_ops(static_cast<PeakKind>(kind), seconds);
            return std::pair(rates.best, rates.median);
        },
        "kind"_a, "seconds"_a, "Best and median 10^9 operations per second of all threads, from registers.");
    nb::enum_<PeakKind>(m, "PeakKind", nb::is_arithmetic())
        .value("MULTIPLY_ADD_F32", PeakKind::kMultiplyAddF32)
        .value("DOT_I8", PeakKind::kDotI8)
        .value("TILE_BF16", PeakKind::kTileBf16);
}

}  // namespace

void bind_ops(nb::module_& m) {
    bind_norms(m);
    bind_rotary(m);
    bind_attention(m);
    bind_mla_attention(m);
    bind_route(m);
    bind_elementwise(m);
    bind_probes(m);
}

}  // namespace moesaic
