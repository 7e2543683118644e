"""Routed experts in one call against one token, one expert at a time in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tests.kernels.oracle import multiplies_bfloat16, packed, relative_error, seen_by, tokens

from moesaic.errors import KernelError
from moesaic.kernels import Activation, PackedExperts, moe_forward
from moesaic.quant import FORMATS

# The input of down is rounded after float32 sums, so a value may fall to the other side of a step than in the oracle:
# one step in 127 of one of many terms.
ONE_STEP = 2e-3
FLOAT32_SUMS = 1e-5
BFLOAT16 = 1e-2  # three products with weights of 8 bits of mantissa

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 6, 256, 512
FORMATS_OF_PARTS = [
    ("F32", "F32", "F32"),
    ("F16", "BF16", "F32"),
    ("Q4_K", "Q4_K", "Q6_K"),
    ("F32", "Q8_0", "BF16"),
    ("Q5_0", "F16", "Q2_K"),
    ("Q3_K", "Q5_K", "Q4_1"),
    ("FP8", "FP8_32", "FP8"),
    ("INT4_32_BF16", "UINT4_64_F16", "FP8"),
]


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": np.vectorize(lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def apply(name, gate, up):
    if name == "swiglu_oai":  # GptOssExperts of transformers
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return (up + 1) * gate * sigmoid(1.702 * gate)
    return ACTIVATIONS[name](up) if gate is None else ACTIVATIONS[name](gate) * up


class Layer:
    """Random experts, packed and as float64."""

    def __init__(self, formats, activation="silu", gated=True, biased=False, sizes=(HIDDEN, INTERMEDIATE)):
        self.formats, self.activation = formats, activation
        hidden, inner = sizes
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        self.parts, self.values, self.biases = [], [], []
        for i, (name, (rows, cols)) in enumerate(zip(formats, shapes, strict=True)):
            part, values = packed(name, rows, cols, NUM_EXPERTS, seed=10 * i)
            absent = i == 0 and not gated
            self.parts.append(None if absent else part)
            self.values.append(None if absent else values)
            self.biases.append(tokens(NUM_EXPERTS, rows, seed=i) if biased and not absent else None)
        self.packed = PackedExperts(*self.parts, *self.biases, activation=Activation(activation))

    def project(self, i, expert, x, num_tokens):
        if self.parts[i] is None:
            return None
        bias = 0.0 if self.biases[i] is None else self.biases[i][expert].numpy().astype(np.float64)
        return self.values[i][expert] @ seen_by(self.formats[i], x, num_tokens) + bias

    def expected(self, x, index, weights):
        out = np.zeros(x.shape)
        for token, choice in itertools.product(range(len(x)), range(index.shape[1])):
            expert = int(index[token, choice])
            if not 0 <= expert < NUM_EXPERTS:
                continue
            row, count = x[token].numpy(), int((index == expert).sum())
            inner = apply(self.activation, self.project(0, expert, row, count), self.project(1, expert, row, count))
            out[token] += float(weights[token, choice]) * self.project(2, expert, inner.astype(np.float32), count)
        return out


def routing(num_tokens, top_k, seed=3):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)])
    return index, torch.rand(num_tokens, top_k, generator=generator)


def tolerance_of(layer, index):
    """The bound for the numbers of tokens that experts get."""
    most = int(np.bincount(index.numpy().ravel().clip(0)).max())
    if any(multiplies_bfloat16(name, HIDDEN, most) for name in layer.formats):
        return BFLOAT16
    return FLOAT32_SUMS if all(not FORMATS[name].rounds_activations for name in layer.formats) else ONE_STEP


def check(layer, num_tokens, top_k=3):
    x = tokens(num_tokens, layer.packed.hidden)
    index, weights = routing(num_tokens, top_k)
    result = moe_forward(x, index, weights, layer.packed)
    assert relative_error(result, layer.expected(x, index, weights)) < tolerance_of(layer, index)


@pytest.mark.parametrize("formats", FORMATS_OF_PARTS, ids="-".join)
def test_formats_of_gate_up_and_down_are_independent(formats, each_isa):
    layer = Layer(formats)
    for num_tokens in (1, 2, 5, 33, 67):
        check(layer, num_tokens)


@pytest.mark.parametrize(
    "formats", [("Q4_K", "Q2_K", "Q6_K"), ("Q8_0", "BF16", "Q8_0"), ("F32", "FP8", "IQ3_S")], ids="-".join
)
def test_many_tokens_an_expert(formats, each_isa):
    """Threads then take several items at once: pairs of rows of gate and up, and up to eight panels of down."""
    check(Layer(formats, biased=True, sizes=(768, 512)), 100)
    check(Layer(("Q8_0", "Q8_0", "Q5_0"), biased=True, sizes=(288, 480)), 90)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu_oai"])
def test_activations_with_biases(activation, gated, each_isa):
    if activation == "swiglu_oai" and not gated:
        with pytest.raises(KernelError, match="gate"):
            Layer(("F32",) * 3, activation, gated)
        return
    check(Layer(("F32", "F16", "BF16"), activation, gated, biased=True, sizes=(40, 72)), 7)
    check(Layer(("Q8_0", "Q8_0", "Q4_0"), activation, gated, biased=True, sizes=(96, 160)), 7)


def test_widths_that_fill_no_tile(each_isa):
    check(Layer(("F32", "F32", "F32"), sizes=(19, 37), biased=True), 6)
    check(Layer(("Q4_0", "Q5_1", "Q8_0"), sizes=(32, 96)), 6)


def test_all_tokens_choose_one_expert(each_isa):
    layer = Layer(("Q4_K", "Q4_K", "Q4_K"))
    x = tokens(50, HIDDEN)
    index, weights = torch.full((50, 1), 4), torch.ones(50, 1)
    result = moe_forward(x, index, weights, layer.packed)
    assert relative_error(result, layer.expected(x, index, weights)) < tolerance_of(layer, index)


def test_an_id_outside_the_experts_adds_nothing(each_isa):
    layer = Layer(("F32", "F32", "F32"), sizes=(32, 64))
    x, (index, weights) = tokens(4, 32), routing(4, 3)
    index[0, 1], index[2] = -1, NUM_EXPERTS
    result = moe_forward(x, index, weights, layer.packed)
    assert relative_error(result, layer.expected(x, index, weights)) < FLOAT32_SUMS
    assert (result[2] == 0).all()


def test_results_do_not_depend_on_the_batch(each_isa):
    """A token's result is the same bits alone as beside others that share its experts (up to the order of sums)."""
    layer = Layer(("Q4_K", "Q5_K", "Q6_K"))
    x, (index, weights) = tokens(16, HIDDEN), routing(16, 3)
    together = moe_forward(x, index, weights, layer.packed)
    for t in (0, 7, 15):
        alone = moe_forward(x[t : t + 1], index[t : t + 1], weights[t : t + 1], layer.packed)
        assert relative_error(together[t : t + 1], alone.numpy().astype(np.float64)) < 1e-5


def test_no_tokens_and_given_output():
    layer = Layer(("F32", "F32", "F32"), sizes=(32, 64))
    index, weights = routing(3, 2)
    assert moe_forward(torch.empty(0, 32), index[:0], weights[:0], layer.packed).shape == (0, 32)
    out, x = torch.empty(3, 32), tokens(3, 32)
    assert moe_forward(x, index, weights, layer.packed, out=out) is out
    assert relative_error(out, layer.expected(x, index, weights)) < FLOAT32_SUMS


def test_wrong_arguments_are_refused():
    layer = Layer(("F32", "F32", "F32"), sizes=(32, 64))
    x, (index, weights) = tokens(3, 32), routing(3, 2)
    for bad in (
        lambda: moe_forward(tokens(3, 31), index, weights, layer.packed),
        lambda: moe_forward(x, index.int(), weights, layer.packed),
        lambda: moe_forward(x, index[:2], weights[:2], layer.packed),
        lambda: moe_forward(x, index, weights.double(), layer.packed),
        lambda: moe_forward(x, index, weights, layer.packed, out=x),
        lambda: PackedExperts(layer.parts[2], layer.parts[1], layer.parts[2]),
        lambda: PackedExperts(None, layer.parts[1], layer.parts[2], gate_bias=torch.zeros(NUM_EXPERTS, 64)),
        lambda: PackedExperts(*layer.parts, up_bias=torch.zeros(NUM_EXPERTS, 63)),
    ):
        with pytest.raises(KernelError):
            bad()
