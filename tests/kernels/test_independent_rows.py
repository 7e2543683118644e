"""What a token gets from a product does not depend on how many tokens there are, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic import _native
from moesaic.kernels import (
    Activation,
    PackedExperts,
    PackedTensor,
    independent_rows,
    linear,
    linear_transposed,
    moe_forward,
    ops,
)
from moesaic.quant import FORMATS, get_format
from moesaic.weights.random_blocks import random_blocks

BATCHES = (1, 2, 3, 4, 7, 33)


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


def packed(name, rows, cols, count=1, seed=0):
    fmt = get_format(name)
    rng = np.random.default_rng(seed)
    tensor = PackedTensor.empty(fmt, rows, cols, count)
    for index in range(count):
        blocks = random_blocks(fmt, rows * cols // fmt.block_size, 0.05, rng)
        tensor.pack_(index, blocks.reshape(rows, -1))
    return tensor


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_products(name):
    weight, x = packed(name, 48, 512), randn(max(BATCHES), 512)
    with independent_rows():
        alone = torch.cat([linear(row[None], weight) for row in x])
        transposed = torch.cat([linear_transposed(row[None, :48].contiguous(), weight) for row in x])
        for batch in BATCHES:
            assert torch.equal(linear(x[:batch], weight), alone[:batch]), batch
            assert torch.equal(linear_transposed(x[:batch, :48].contiguous(), weight), transposed[:batch]), batch


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "BF16", "F32", "FP8"])
def test_experts(name):
    """Others choose the same experts, some of them by many tokens."""
    gate, up = (packed(name, 256, 512, 6, seed) for seed in (1, 2))
    experts = PackedExperts(gate, up, packed(name, 512, 256, 6, 3), None, None, None, Activation("silu"))
    x, weights = randn(33, 512), randn(33, 3, seed=1).abs()
    chosen = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(33)])
    with independent_rows():
        alone = torch.cat(
            [moe_forward(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1], experts) for i in range(33)]
        )
        for batch in BATCHES:
            assert torch.equal(moe_forward(x[:batch], chosen[:batch], weights[:batch], experts), alone[:batch]), batch


def test_norms_rotation_and_routing():
    x, weight = randn(33, 4096), randn(4096, seed=1)
    logits = randn(33, 128, seed=2)
    q, k = randn(1, 32, 33, 128, seed=3), randn(1, 4, 33, 128, seed=4)
    cos, sin = randn(1, 33, 64, seed=5), randn(1, 33, 64, seed=6)
    norms = ops.rms_norm(x, weight, 1e-6)
    routed = ops.route(logits, 8, score="softmax", normalize=True)
    many = q.clone(), k.clone()
    ops.norm_and_rotate_(
        *many, cos, sin, layout="half", norm="per_head", q_norm=weight[:128], k_norm=weight[:128], eps=1e-6
    )
    for i in range(33):
        assert torch.equal(ops.rms_norm(x[i : i + 1], weight, 1e-6), norms[i : i + 1])
        for one, all_ in zip(ops.route(logits[i : i + 1], 8, score="softmax", normalize=True), routed, strict=True):
            assert torch.equal(one, all_[i : i + 1])
        single = q[:, :, i : i + 1].clone(), k[:, :, i : i + 1].clone()
        ops.norm_and_rotate_(
            *single,
            cos[:, i : i + 1],
            sin[:, i : i + 1],
            layout="half",
            norm="per_head",
            q_norm=weight[:128],
            k_norm=weight[:128],
            eps=1e-6,
        )
        assert torch.equal(single[0], many[0][:, :, i : i + 1])
        assert torch.equal(single[1], many[1][:, :, i : i + 1])


@pytest.mark.parametrize("name", ["F32", "Q4_K"])
def test_many_tokens_of_few_rows_are_divided_over_the_threads(name):
    weight, x = packed(name, 40, 512), randn(530, 512)
    before = _native.num_threads()
    results = []
    for threads in (1, 3, 8):
        _native.set_num_threads(threads)
        results.append(linear(x, weight))
    _native.set_num_threads(before)
    expected = x.double() @ weight.dequantize()[0].double().T
    assert torch.allclose(results[0].double(), expected, atol=1e-5 if name == "F32" else 0.2)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_the_switch_is_put_back():
    assert _native.set_independent_rows(False) is False
    with independent_rows():
        assert _native.set_independent_rows(True) is True
    assert _native.set_independent_rows(False) is False
