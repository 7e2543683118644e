// Bindings of linear maps and experts.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "kernels/linear.h"
#include "kernels/matmul.h"
#include "moe.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace moesaic {

namespace {

using Release = nb::call_guard<ReleaseGil>;
using Address = std::uintptr_t;
using Int = std::int64_t;

// format, rows, cols, weights_ptr, first_row, num_rows, bias_ptr, out_ptr, out_stride
using JobTuple = std::tuple<int, Int, Int, Address, Int, Int, Address, Address, Int>;

LinearJob make_job(int format, Int rows, Int cols, Address weights, Int first_row, Int num_rows, Address bias,
                   Address out, Int out_stride) {
    return {&format_info(format),
            rows,
            cols,
            as_pointer<const std::uint8_t>(weights),
            first_row,
            num_rows,
            as_pointer<const float>(bias),
            as_pointer<float>(out),
            out_stride,
            0};
}

void bind_linear(nb::module_& m) {
    m.def(
        "bf16_from",
        [](int format) {
            const MatmulKernels& kernels = matmul_table().formats[format_info(format).index];
            return kernels.matmul_bf16 == nullptr ? Int{0} : kernels.bf16_from;
        },
        "format"_a,
        "From how many tokens on products with this format are computed in bfloat16 by tiles; 0: never, on the active "
        "instruction set.");
    m.def(
        "linear",
        [](int format, Int rows, Int cols, Address weights_ptr, Int first_row, Int num_rows, Address bias_ptr,
           Address out_ptr, Int out_stride, Address x_ptr, Int x_stride, Int num_tokens) {
            const LinearJob job =
                make_job(format, rows, cols, weights_ptr, first_row, num_rows, bias_ptr, out_ptr, out_stride);
            linear({&job, 1}, {as_pointer<const float>(x_ptr), x_stride}, num_tokens);
        },
        "format"_a, "rows"_a, "cols"_a, "weights_ptr"_a, "first_row"_a, "num_rows"_a, "bias_ptr"_a, "out_ptr"_a,
        "out_stride"_a, "x_ptr"_a, "x_stride"_a, "num_tokens"_a, Release(),
        "out[t] = W[first_row : first_row + num_rows] x[t] + bias; strides in floats, bias_ptr may be 0.");
    m.def(
        "linear_multi",
        [](const std::vector<JobTuple>& tuples, Address x_ptr, Int x_stride, Int num_tokens) {
            std::vector<LinearJob> jobs;
            for (const JobTuple& tuple : tuples) jobs.push_back(std::apply(make_job, tuple));
            ReleaseGil release;
            linear(jobs, {as_pointer<const float>(x_ptr), x_stride}, num_tokens);
        },
        "jobs"_a, "x_ptr"_a, "x_stride"_a, "num_tokens"_a,
        "linear of several matrices with the same input; a job is the first nine arguments of linear.");
}

template <void (*kFunction)(const HeadMatrices&, HeadRows<const float>, HeadRows<float>, Int)>
void bind_heads(nb::module_& m, const char* name, const char* doc) {
    m.def(
        name,
        [](int format, Int rows, Int cols, Address weights_ptr, Int matrix_bytes, Int row_step, Int num_heads,
           Int first_row, Int num_rows, Address x_ptr, Int x_token_stride, Int x_head_stride, Address out_ptr,
           Int out_token_stride, Int out_head_stride, Int num_tokens) {
            const HeadMatrices w{&format_info(format),
                                 rows,
                                 cols,
                                 as_pointer<const std::uint8_t>(weights_ptr),
                                 matrix_bytes,
                                 row_step,
                                 num_heads,
                                 first_row,
                                 num_rows};
            kFunction(w, {as_pointer<const float>(x_ptr), x_token_stride, x_head_stride},
                      {as_pointer<float>(out_ptr), out_token_stride, out_head_stride}, num_tokens);
        },
        "format"_a, "rows"_a, "cols"_a, "weights_ptr"_a, "matrix_bytes"_a, "row_step"_a, "num_heads"_a, "first_row"_a,
        "num_rows"_a, "x_ptr"_a, "x_token_stride"_a, "x_head_stride"_a, "out_ptr"_a, "out_token_stride"_a,
        "out_head_stride"_a, "num_tokens"_a, Release(), doc);
}

// format, weights_ptr, matrix_bytes, bias_ptr, bias_stride
using MatricesTuple = std::tuple<int, Address, Int, Address, Int>;
// intermediate rows, then gate, up and down
using SliceTuple = std::tuple<Int, std::vector<MatricesTuple>>;

ExpertSlice make_slice(Int intermediate, const std::vector<MatricesTuple>& matrices) {
    if (matrices.size() != 3) throw nb::value_error("experts have three projections: gate, up and down");
    ExpertSlice slice{};
    slice.intermediate = intermediate;
    ExpertMatrices* parts[] = {&slice.gate, &slice.up, &slice.down};
    for (std::size_t i = 0; i < 3; ++i) {
        const auto& [format, weights, matrix_bytes, bias, bias_stride] = matrices[i];
        if (weights == 0) continue;
        *parts[i] = {&format_info(format), as_pointer<const std::uint8_t>(weights), matrix_bytes,
                     as_pointer<const float>(bias), bias_stride};
    }
    return slice;
}

// The projections of one layer's experts, described once; the weights belong to the caller.
Experts make_experts(Int num_experts, Int hidden, const std::vector<SliceTuple>& slices, int activation, float alpha,
                     float limit) {
    if (activation < 0 || activation > static_cast<int>(ActivationKind::kSwigluOai)) {
        throw nb::value_error("unknown activation");
    }
    Experts experts{{}, num_experts, hidden, {static_cast<ActivationKind>(activation), alpha, limit}};
    for (const SliceTuple& slice : slices) experts.slices.push_back(std::apply(make_slice, slice));
    check_experts(experts);
    return experts;
}

void bind_experts(nb::module_& m) {
    nb::enum_<ActivationKind>(m, "ActivationKind")
        .value("silu", ActivationKind::kSilu)
        .value("gelu", ActivationKind::kGelu)
        .value("gelu_tanh", ActivationKind::kGeluTanh)
        .value("relu", ActivationKind::kRelu)
        .value("relu2", ActivationKind::kRelu2)
        .value("swiglu_oai", ActivationKind::kSwigluOai);
    nb::class_<Experts>(m, "Experts", "The projections of one layer's experts, described once.")
        .def(
            "__init__",
            [](Experts* self, Int num_experts, Int hidden, const std::vector<SliceTuple>& slices, int activation,
               float alpha, float limit) {
                new (self) Experts(make_experts(num_experts, hidden, slices, activation, alpha, limit));
            },
            "num_experts"_a, "hidden"_a, "slices"_a, "activation"_a, "alpha"_a, "limit"_a,
            "slices: of the intermediate rows, one per node: their number, and (format, weights_ptr, matrix_bytes, "
            "bias_ptr, bias_stride in floats) of gate, up and down; weights_ptr 0: no gate.");
    m.def(
        "moe_forward",
        [](const Experts& experts, Address experts_ptr, Address weights_ptr, Int top_k, Address x_ptr, Int x_stride,
           Int num_tokens, Address out_ptr) {
            moe_forward(experts, {as_pointer<const Int>(experts_ptr), as_pointer<const float>(weights_ptr), top_k},
                        as_pointer<const float>(x_ptr), x_stride, num_tokens, as_pointer<float>(out_ptr));
        },
        "experts"_a, "experts_ptr"_a, "weights_ptr"_a, "top_k"_a, "x_ptr"_a, "x_stride"_a, "num_tokens"_a, "out_ptr"_a,
        Release(),
        "out[t] = sum over k of weights[t, k] * expert experts[t, k] of x[t]; ids outside the experts count as none.");
}

}  // namespace

void bind_products(nb::module_& m) {
    bind_linear(m);
    bind_heads<linear_heads>(m, "linear_heads", "out[t, h] = W_h x[t, h]; see csrc/kernels/linear.h.");
    bind_heads<linear_transposed_heads>(m, "linear_transposed_heads", "out[t, h] = x[t, h] W_h, in float32.");
    bind_experts(m);
}

}  // namespace moesaic
