"""Experts that are cut over memory nodes against the same experts whole; nodes are pretended where there are none."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.oracle import packed, relative_error, tokens
from tests.kernels.test_moe import FORMATS_OF_PARTS, NUM_EXPERTS, routing

from moesaic import kernels
from moesaic.errors import ConfigError, KernelError
from moesaic.kernels import Activation, PackedExperts, PackedTensor, SlicedTensor, cut_intermediate, empty_stack
from moesaic.quant import FORMATS

# A slice makes the same input of down, bit by bit: groups of 32 lie within it. Only the float32 sums over the columns
# of down are associated differently, a few roundings of 6e-8 of the largest partial sum each.
REASSOCIATED = 2e-6


@pytest.fixture
def nodes():
    """Sets number of nodes and of threads; both are restored."""
    before = kernels.num_threads()

    def use(num_nodes, num_threads=3):
        kernels.set_num_nodes(num_nodes)
        kernels.set_num_threads(num_threads)

    yield use
    kernels.set_num_nodes(0)
    kernels.set_num_threads(before)


def cut(part, sizes, axis):
    """The same matrices in slices."""
    stack = empty_stack(part.format, part.rows, part.cols, part.num_matrices, sizes, axis)
    for index in range(part.num_matrices):
        stack.pack_(index, part.unpack(index))
    return stack


def whole_experts(formats, hidden, intermediate, activation="silu", gated=True, biased=False):
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    parts = [packed(name, *shapes[i], NUM_EXPERTS, seed=i)[0] for i, name in enumerate(formats)]
    biases = [tokens(NUM_EXPERTS, shape[0], seed=i) if biased else None for i, shape in enumerate(shapes)]
    if not gated:
        parts[0] = biases[0] = None
    return PackedExperts(*parts, *biases, activation=Activation(activation))


def cut_experts(e):
    sizes = cut_intermediate(e.intermediate, e.down.format)
    gate = None if e.gate is None else cut(e.gate, sizes, "rows")
    biases = (e.gate_bias, e.up_bias, e.down_bias)
    return PackedExperts(gate, cut(e.up, sizes, "rows"), cut(e.down, sizes, "cols"), *biases, activation=e.activation)


def check(experts, num_tokens, nodes, tolerance=REASSOCIATED):
    x, (index, weights) = tokens(num_tokens, experts.hidden), routing(num_tokens, 3)
    expected = kernels.moe_forward(x, index, weights, experts).numpy().astype("float64")
    for num_nodes in (1, 2, 3):
        nodes(num_nodes)
        sliced = cut_experts(experts)
        assert len(sliced.up.slices) == len(sliced.down.slices) <= num_nodes
        for other, num_threads in itertools.product({1, num_nodes}, (1, 2, 5)):  # slices need not be as many as nodes
            nodes(other, num_threads)
            assert relative_error(kernels.moe_forward(x, index, weights, sliced), expected) < tolerance


@pytest.mark.parametrize("formats", FORMATS_OF_PARTS, ids="-".join)
def test_slices_give_what_the_whole_gives(formats, nodes, each_isa):
    for num_tokens in (1, 7):
        check(whole_experts(formats, 256, 768), num_tokens, nodes)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_biases_are_added_once_and_to_their_rows(activation, nodes):
    check(whole_experts(("F32",) * 3, 40, 200, activation, biased=True), 5, nodes)
    check(whole_experts(("Q8_0", "F16", "Q4_0"), 96, 160, activation, biased=True), 5, nodes)


def test_widths_that_fill_no_tile_and_no_gate(nodes):
    check(whole_experts(("F32",) * 3, 19, 77, "gelu", gated=False, biased=True), 6, nodes)


def test_results_do_not_depend_on_the_number_of_threads(nodes):
    nodes(2)
    x, (index, weights) = tokens(3, 256), routing(3, 3)
    sliced = cut_experts(whole_experts(("Q4_K", "Q4_K", "Q6_K"), 256, 768))
    results = []
    for num_threads in (1, 2, 3, 7):
        nodes(2, num_threads)
        results.append(kernels.moe_forward(x, index, weights, sliced))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize(
    ("intermediate", "down", "num_nodes", "sizes"),
    [
        (768, "Q4_K", 1, (768,)),
        (768, "Q4_K", 2, (512, 256)),
        (768, "Q4_K", 4, (256, 256, 256)),  # fewer slices than nodes: not enough blocks
        (2048, "Q4_K", 4, (512,) * 4),
        (768, "Q8_0", 2, (384, 384)),
        (2880, "MXFP4", 2, (1440, 1440)),
        (2880, "MXFP4", 4, (736, 704, 736, 704)),
        (200, "F32", 3, (96, 64, 40)),  # floats may leave a rest
        (19, "F32", 2, (19,)),
    ],
)
def test_where_the_intermediate_dimension_is_cut(intermediate, down, num_nodes, sizes):
    assert cut_intermediate(intermediate, FORMATS[down], num_nodes) == sizes


@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_a_sliced_tensor_is_the_stack_in_pieces(axis):
    part, _ = packed("Q4_K", 64, 768, 2)
    sliced = cut(part, (32, 32) if axis == "rows" else (512, 256), axis)
    assert isinstance(sliced, SlicedTensor)
    assert (sliced.format, sliced.num_matrices, sliced.rows, sliced.cols) == (part.format, 2, 64, 768)
    assert sliced.nbytes == part.nbytes == sum(piece.nbytes for piece in sliced.slices)
    assert (sliced.unpack(1) == part.unpack(1)).all()
    assert torch.equal(sliced.dequantize(), part.dequantize())
    with pytest.raises(KernelError, match="expected uint8"):
        sliced.pack_(0, part.unpack(0)[:32])


def test_slices_that_do_not_go_together_are_refused():
    e = whole_experts(("F32",) * 3, 32, 128)
    with pytest.raises(KernelError, match=r"down is cut into \[128\]"):
        PackedExperts(cut(e.gate, (64, 64), "rows"), cut(e.up, (64, 64), "rows"), e.down)
    with pytest.raises(KernelError, match="gate is cut"):
        PackedExperts(e.gate, cut(e.up, (96, 32), "rows"), cut(e.down, (96, 32), "cols"))
    with pytest.raises(KernelError, match="one format"):
        SlicedTensor((PackedTensor.empty(FORMATS["F32"], 2, 2), PackedTensor.empty(FORMATS["F16"], 2, 2)), "rows")


def test_numbers_of_nodes_that_cannot_be_are_refused():
    for count in (-1, 65):
        with pytest.raises(ConfigError, match="memory nodes"):
            kernels.set_num_nodes(count)
