"""Products with packed weights against float64, on every instruction set, format and awkward shape.

Two bounds. Against an oracle that rounds activations as the kernels do, errors are those of float32 sums: below 1e-5 of
the largest result. Against the exact product, they are at most what rounding to int8 explains: half a step of each
activation's group, times the magnitude of its weight.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.oracle import (
    multiplies_bfloat16,
    packed,
    packed_extremes,
    relative_error,
    rounded,
    seen_by,
    to_bfloat16,
    tokens,
)

from moesaic.errors import KernelError
from moesaic.kernels import (
    independent_rows,
    linear,
    linear_heads,
    linear_multi,
    linear_transposed,
    linear_transposed_heads,
)
from moesaic.quant import FORMATS

FLOAT32_SUMS = 1e-5
TOKENS = [1, 2, 3, 4, 5, 6, 7, 17, 24, 40, 67]
ALL_FORMATS = list(FORMATS)


def shapes(name: str) -> list[tuple[int, int]]:
    """(rows, cols): rows that fill no tile, cols that are odd multiples of the block and end inside a chunk."""
    block = FORMATS[name].block_size
    if block == 1:
        return [(1, 1), (16, 64), (37, 257), (53, 31)]
    return [(1, block), (15, 3 * block), (53, 288 if block == 32 else 768)]


def check_bfloat16(result: np.ndarray, x: np.ndarray, values: np.ndarray) -> None:
    """Weights are cut to 8 bits of mantissa: each is off by less than 2^-7, all together by much less, without bias."""
    exact, magnitude = x @ values.T, np.abs(x) @ np.abs(values).T
    error = result - exact
    assert (np.abs(error) <= 2.0**-7 * magnitude + FLOAT32_SUMS * np.abs(exact).max()).all()
    if x.shape[1] >= 256 and np.abs(exact).sum() > 0:
        assert np.sqrt((error**2).sum() / (exact**2).sum()) < 5e-3
        chance = max(1.0, np.sqrt(200 / error.size))  # a few sums are off to one side by chance
        assert abs((error * np.sign(exact)).sum() / np.abs(exact).sum()) < 2e-3 * chance


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_linear(name, each_isa):
    for rows, cols in shapes(name):
        weight, values = packed(name, rows, cols)
        bias = tokens(rows, seed=5)
        for num_tokens in TOKENS:
            x = tokens(num_tokens, cols)
            result = linear(x, weight, bias)
            exact = x.numpy().astype(np.float64) @ values[0].T + bias.numpy()
            if multiplies_bfloat16(name, cols, num_tokens):
                check_bfloat16(result.numpy() - bias.numpy(), to_bfloat16(x.numpy()), values[0])
                continue
            same_rounding = seen_by(name, x.numpy()) @ values[0].T + bias.numpy()
            assert relative_error(result, same_rounding) < FLOAT32_SUMS, (rows, cols, num_tokens)
            if FORMATS[name].rounds_activations:
                allowed = rounded(x.numpy())[1] @ np.abs(values[0]).T + FLOAT32_SUMS * np.abs(exact).max()
                assert (np.abs(result.numpy() - exact) <= allowed).all()


@pytest.mark.parametrize("name", [name for name in ALL_FORMATS if FORMATS[name].rounds_activations])
def test_linear_with_the_largest_sums(name, each_isa):
    """Equal bytes in all of a row (weights as large as the format has them) times activations of one magnitude."""
    rows, cols = 16, 768
    weight, values = packed_extremes(name, rows, cols)
    x = torch.ones(6, cols)
    x[1] = -1
    x[2, ::2] = -1
    x[3, 1::2] = -1
    x[4, :100] = -1
    for num_tokens in (1, 2, 3, 4, 6):
        expected = seen_by(name, x[:num_tokens].numpy(), num_tokens) @ values.T
        assert relative_error(linear(x[:num_tokens], weight), expected) < FLOAT32_SUMS, num_tokens


@pytest.mark.parametrize("name", [name for name in ALL_FORMATS if FORMATS[name].rounds_activations])
def test_few_tokens_are_one_by_one_to_the_bit(name, each_isa):
    """Many columns, and an odd number of panels: what a token gets does not depend on the others."""
    rows, cols = 33, 2304
    weight, values = packed(name, rows, cols)
    x = tokens(5, cols)
    one_by_one = torch.cat([linear(x[t : t + 1], weight) for t in range(5)])
    assert relative_error(one_by_one, seen_by(name, x.numpy()) @ values[0].T) < FLOAT32_SUMS
    for num_tokens in (2, 3, 4, 5):
        assert torch.equal(linear(x[:num_tokens], weight), one_by_one[:num_tokens]), num_tokens


@pytest.mark.parametrize("name", ["BF16", "FP8", "Q2_K", "Q4_K", "Q8_0", "IQ2_S"])
def test_many_rows_of_many_tokens_are_what_a_few_rows_are(name, each_isa):
    """By tiles, several pairs of panels share blocks of columns and passes over tokens; alone a pair does not."""
    cols = 1280 if FORMATS[name].block_size > 32 else 1312
    weight, values = packed(name, 600, cols)
    x = tokens(280, cols)
    for num_tokens in (40, 280):
        whole = linear(x[:num_tokens], weight, rows=slice(5, 597))
        for start in (5, 37, 210, 580):
            rows = slice(start, min(start + 17, 597))
            assert torch.equal(whole[:, start - 5 : rows.stop - 5], linear(x[:num_tokens], weight, rows=rows))
    exact = seen_by(name, x.numpy(), 280) @ values[0, 5:597].T
    assert relative_error(whole, exact) < (5e-3 if multiplies_bfloat16(name, cols, 280) else FLOAT32_SUMS)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K", "Q8_0"])
def test_linear_writes_only_its_rows_into_strided_memory(name, each_isa):
    weight, values = packed(name, 70, 256, num_matrices=3)
    wide = tokens(6, 300)
    x = wide[:, 20:276]
    for start, stop in ((0, 70), (16, 48), (5, 70), (33, 34)):
        out = torch.full((6, 100), 7.0)
        linear(x, weight, out=out[:, 10 : 10 + stop - start], index=2, rows=slice(start, stop))
        expected = seen_by(name, np.ascontiguousarray(x.numpy())) @ values[2, start:stop].T
        assert relative_error(out[:, 10 : 10 + stop - start], expected) < FLOAT32_SUMS
        assert (out[:, :10] == 7).all()
        assert (out[:, 10 + stop - start :] == 7).all()


def test_linear_multi_equals_linear_of_each(each_isa):
    parts = [packed(name, rows, 512)[0] for name, rows in (("Q4_K", 100), ("F16", 16), ("Q6_K", 33), ("Q8_0", 7))]
    biases = [tokens(100, seed=2), None, tokens(33, seed=3), None]
    for num_tokens in (1, 9):
        x = tokens(num_tokens, 512)
        for part, bias, out in zip(parts, biases, linear_multi(x, parts, biases), strict=True):
            assert torch.equal(out, linear(x, part, bias))


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_linear_transposed(name, each_isa):
    for rows, cols in shapes(name):
        weight, values = packed(name, rows, cols)
        for num_tokens in (1, 4, 7):
            x = tokens(num_tokens, rows)
            expected = x.numpy().astype(np.float64) @ values[0]
            assert relative_error(linear_transposed(x, weight), expected) < FLOAT32_SUMS, (rows, cols, num_tokens)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("head_rows", [48, 20])
def test_heads(stacked, head_rows, each_isa):
    heads, cols, rows = 5, 288, slice(3, 17)
    weight, values = packed("Q5_1", head_rows if stacked else heads * head_rows, cols, heads if stacked else 1)
    values = values.reshape(heads, head_rows, cols)
    for num_tokens in (1, 6):
        x = tokens(heads, num_tokens, cols).transpose(0, 1)
        expected = np.einsum("thk,hnk->thn", seen_by("Q5_1", np.ascontiguousarray(x.numpy())), values[:, rows])
        assert relative_error(linear_heads(x, weight, rows), expected) < FLOAT32_SUMS
        x = tokens(num_tokens, heads, 14)
        expected = np.einsum("thn,hnk->thk", x.numpy().astype(np.float64), values[:, rows])
        out = torch.empty(heads, num_tokens, cols).transpose(0, 1)
        assert relative_error(linear_transposed_heads(x, weight, rows, out), expected) < FLOAT32_SUMS


@pytest.mark.parametrize("name", ["Q5_1", "Q4_K", "IQ2_S", "FP8", "BF16", "F32"])
def test_transposed_heads_of_many_tokens(name, each_isa):
    """Many tokens meet transposed weights, if a head has whole panels of rows; few, and independent ones, do not."""
    heads, cols, rows = 3, 768, slice(16, 48)
    weight, values = packed(name, 64, cols, heads)
    for num_tokens in (8, 9, 150):
        x = tokens(num_tokens, heads, 32)
        expected = np.einsum("thn,hnk->thk", x.numpy().astype(np.float64), values[:, rows])
        out = torch.empty(heads, num_tokens, cols).transpose(0, 1)
        assert relative_error(linear_transposed_heads(x, weight, rows, out), expected) < FLOAT32_SUMS
        with independent_rows(True):
            alone = torch.cat([linear_transposed_heads(row[None], weight, rows) for row in x])
            assert torch.equal(linear_transposed_heads(x, weight, rows), alone)
        assert torch.equal(out, alone) == (num_tokens == 8)


def test_no_tokens():
    weight, _ = packed("Q4_K", 20, 256)
    assert linear(torch.empty(0, 256), weight).shape == (0, 20)
    assert linear_transposed(torch.empty(0, 20), weight).shape == (0, 256)


def test_wrong_arguments_are_refused():
    weight, _ = packed("Q8_0", 20, 64)
    x = tokens(2, 64)
    for call in (
        lambda: linear(tokens(2, 63), weight),
        lambda: linear(x.double(), weight),
        lambda: linear(x.T.contiguous().T, weight),
        lambda: linear(x, weight, bias=tokens(19)),
        lambda: linear(x, weight, out=torch.empty(2, 19)),
        lambda: linear(x, weight, index=1),
        lambda: linear(x, weight, rows=slice(20, 30)),
        lambda: linear(x, weight, rows=slice(0, 20, 2)),
        lambda: linear_multi(x, [weight], [None, None]),
        lambda: linear_multi(x, []),
        lambda: linear_transposed(tokens(2, 19), weight),
        lambda: linear_heads(tokens(2, 3, 64), weight),
        lambda: linear_heads(tokens(2, 2, 63), weight),
    ):
        with pytest.raises(KernelError):
            call()
