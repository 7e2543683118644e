"""Products of packed weights on a GPU against float64, on values that `gguf.quants` or a definition gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed, tokens
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.kernels.triton import activations
from moesaic.kernels.triton import linear as subject
from moesaic.kernels.triton.activations import to_lanes, to_thirds
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.formats import device_format, supported_formats
from moesaic.kernels.triton.linear import decode_shape, linear
from moesaic.kernels.triton.linear_dots import dot_items, dot_splits, several_tokens
from moesaic.kernels.triton.views import weight_views
from moesaic.quant import FORMATS

# In float32, or by thirds: a sum of a few hundred products. In bfloat16, on a GPU: two roundings to 8 bits each.
FLOAT_TOLERANCE = 2e-6
BFLOAT16_TOLERANCE = 1e-2

BY_THIRDS = [name for name in supported_formats() if device_format(FORMATS[name], 512).has_thirds]


def tolerance(fmt: str, num_tokens: int) -> float:
    by_thirds = fmt in BY_THIRDS and num_tokens <= activations._MOST_THIRDS
    if num_tokens <= subject._MAX_FEW_TOKENS or by_thirds:
        return FLOAT_TOLERANCE
    return BFLOAT16_TOLERANCE if DEVICE == "cuda" and fmt != "F32" else FLOAT_TOLERANCE


def check(fmt: str, rows: int, cols: int, num_tokens: int) -> None:
    weight, values = packed(fmt, rows, cols)
    x = tokens(num_tokens, cols)
    result = linear(x.to(DEVICE), DeviceTensor.of(weight, DEVICE))
    assert result.shape == (num_tokens, rows)
    assert error_of(result, x.double().numpy() @ values[0].T) < tolerance(fmt, num_tokens)


def error_of(result: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(result.cpu().double().numpy() - expected).max() / np.abs(expected).max())


def columns(fmt: str, num_blocks: int) -> list[int]:
    block = FORMATS[fmt].block_size
    return [1, 12, 37 * num_blocks] if block == 1 else [block * num_blocks]


@pytest.mark.parametrize("fmt", supported_formats())
def test_one_token(fmt):
    for cols in columns(fmt, 3):
        check(fmt, 19, cols, 1)


@pytest.mark.parametrize("fmt", BY_THIRDS)
def test_several_tokens(fmt):
    cols = FORMATS[fmt].block_size * 3 if FORMATS[fmt].block_size > 1 else 48
    check(fmt, 50, cols, 3)


@pytest.mark.parametrize("num_tokens", [3, 8, 11, 32])
@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K"])
def test_numbers_of_tokens(fmt, num_tokens):
    check(fmt, 65, 512, num_tokens)


def test_several_tokens_in_groups(monkeypatch):
    """As many as a program has, a few of the next one's, and parts of the columns."""
    weight, values = packed("Q4_K", 40, 2048)
    x = tokens(11, 2048)
    form = device_format(FORMATS["Q4_K"], 2048)
    bias, out = torch.arange(40.0, device=DEVICE), torch.empty(11, 40, device=DEVICE)
    monkeypatch.setattr("moesaic.kernels.triton.linear_dots.MULTIPROCESSORS", 1)
    views = weight_views(DeviceTensor.of(weight, DEVICE), 0)
    several_tokens(to_thirds(x.to(DEVICE), form, 8), views, form, 40, bias, out)
    assert error_of(out, x.double().numpy() @ values[0].T + np.arange(40)) < FLOAT_TOLERANCE


def test_tokens_do_not_depend_on_others():
    weight, _ = packed("Q4_K", 40, 1024)
    x = tokens(8, 1024).to(DEVICE)
    weight = DeviceTensor.of(weight, DEVICE)
    alone = linear(x[:3], weight)
    assert torch.equal(linear(x, weight)[:3], alone)
    x[3:] = float("nan")
    assert torch.equal(linear(x, weight)[:3], alone)


@pytest.mark.parametrize("fmt", ["Q4_K", "Q2_K", "Q8_0"])
@pytest.mark.parametrize("scale", [1e-6, 1e14])
def test_subnormal_codes_on_tensor_cores_lose_nothing(fmt, scale):
    weight, values = packed(fmt, 32, 512)
    x = tokens(3, 512)
    x *= scale / x.abs().max()
    result = linear(x.to(DEVICE), DeviceTensor.of(weight, DEVICE))
    assert error_of(result, x.double().numpy() @ values[0].T) < FLOAT_TOLERANCE


@pytest.mark.parametrize("items", [1, 2, 24, 28, 63, 64, 448])
def test_iterations_by_tensor_cores_are_all_items(items):
    at_a_time = dot_items(128, device_format(FORMATS["Q8_0"], 32), items)
    assert items % at_a_time == 0 and at_a_time <= 4
    for blocks in (1, 7, 224, 5000):
        assert 1 <= dot_splits(blocks, items // at_a_time, 14) <= items // at_a_time


def test_columns_are_split_such_that_programs_fill_a_gpu():
    assert dot_splits(224, 256, 19) == 11  # 2464 of 2508 at a time
    assert dot_splits(5000, 28, 14) == 1
    assert dot_splits(1, 8, 14) == 8


@pytest.mark.parametrize("fmt", supported_formats())
def test_many_tokens(fmt):
    for cols in columns(fmt, 2):
        check(fmt, 35, cols, 33)


@pytest.mark.parametrize("fmt", supported_formats())
def test_expanded_matrices(fmt, monkeypatch):
    monkeypatch.setattr(subject, "_EXPAND_FROM", 9)
    for cols in columns(fmt, 1):
        check(fmt, 19, cols, 9)


@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("num_tokens", [2, 3])
def test_few_tokens_by_vector_units(fmt, num_tokens, monkeypatch):
    monkeypatch.setattr(activations, "_MOST_THIRDS", 1)
    check(fmt, 19, columns(fmt, 1)[-1], num_tokens)


@pytest.mark.parametrize(("fmt", "num_tokens"), [("Q4_K", 5), ("Q8_0", 16), ("TQ2_0", 3), ("IQ1_S_TERNARY", 3)])
def test_more_tokens_than_a_program_has(fmt, num_tokens, monkeypatch):
    monkeypatch.setattr(activations, "_MOST_THIRDS", 1)
    check(fmt, 19, columns(fmt, 1)[-1], num_tokens)


@pytest.mark.parametrize("fmt", ["Q4_K", "Q2_K", "IQ1_S_TERNARY"])
@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_codes_that_are_subnormal_floats_lose_nothing(fmt, scale):
    weight, values = packed(fmt, 16, 512)
    x = tokens(1, 512)
    x *= scale / x.abs().max()
    result = linear(x.to(DEVICE), DeviceTensor.of(weight, DEVICE))
    assert error_of(result, x.double().numpy() @ values[0].T) < FLOAT_TOLERANCE


def test_matrices_are_expanded_in_parts(monkeypatch):
    monkeypatch.setattr(subject, "_EXPAND_FROM", 9)
    monkeypatch.setattr(subject, "EXPANDED_WEIGHTS", 32 * 16 + 5)
    check("Q8_0", 53, 32, 33)


@pytest.mark.parametrize("num_tokens", [2, 33, 200])
def test_rows_may_be_any_distance_apart_and_a_bias_is_added(num_tokens):
    weight, values = packed("Q8_0", 40, 64, num_matrices=2)
    wide = tokens(num_tokens, 100).to(DEVICE)
    bias = torch.arange(40, dtype=torch.float32, device=DEVICE)
    out = torch.full((num_tokens, 50), 7.0, device=DEVICE)
    x = wide[:, 5:69]
    result = linear(x, DeviceTensor.of(weight, DEVICE), bias, out=out[:, :40], index=1)
    assert result.data_ptr() == out.data_ptr()
    expected = x.cpu().double().numpy() @ values[1].T + np.arange(40)
    assert error_of(result, expected) < tolerance("Q8_0", num_tokens)
    assert (out[:, 40:] == 7).all()


def test_columns_are_split_where_rows_are_few():
    """One panel cannot keep a GPU busy: parts of its columns are summed by a second kernel."""
    fmt, rows, cols = "F32", 16, 16 * 8 * 16 * 2
    form = device_format(FORMATS[fmt], cols)
    assert decode_shape(1, form.num_items(cols), 16) == (16, 2, 1)
    weight, values = packed(fmt, rows, cols)
    x = tokens(2, cols)
    bias = torch.ones(rows, device=DEVICE)
    result = linear(x.to(DEVICE), DeviceTensor.of(weight, DEVICE), bias)
    assert error_of(result, x.double().numpy() @ values[0].T + 1) < 2 * FLOAT_TOLERANCE


@pytest.mark.parametrize("num_panels", [1, 7, 16, 128, 448, 8080])
@pytest.mark.parametrize("num_items", [1, 12, 28, 112, 448])
@pytest.mark.parametrize("at_a_time", [8, 12, 16])
def test_parts_of_columns_are_all_of_them(num_panels, num_items, at_a_time):
    warps, splits, iterations = decode_shape(num_panels, num_items, at_a_time)
    done = splits * iterations * 8 * warps
    assert warps in (1, 2, 4, 8, 16)
    assert num_items <= done and (splits - 1) * iterations * 8 * warps < num_items


def test_no_tokens():
    weight = DeviceTensor.of(packed("F32", 20, 32)[0], DEVICE)
    assert linear(torch.empty(0, 32, device=DEVICE), weight).shape == (0, 20)


def test_wrong_calls_are_refused(monkeypatch):
    weight = DeviceTensor.of(packed("F32", 20, 32)[0], DEVICE)
    x = torch.zeros(3, 32, device=DEVICE)
    with pytest.raises(KernelError, match=r"x is float32 \[3, 31\].*expected float32 \[tokens, 32\]"):
        linear(x[:, :31], weight)
    with pytest.raises(KernelError, match="x is float64"):
        linear(x.double(), weight)
    with pytest.raises(KernelError, match="contiguous along a row"):
        linear(torch.zeros(32, 3, device=DEVICE).T, weight)
    with pytest.raises(KernelError, match=r"bias is .* expected float32 \[20\]"):
        linear(x, weight, x[0])
    with pytest.raises(KernelError, match="one for each of 3 tokens"):
        linear(x, weight, out=torch.zeros(2, 20, device=DEVICE))
    with pytest.raises(KernelError, match="Matrix 1"):
        linear(x, weight, index=1)
    monkeypatch.setattr("moesaic.kernels.triton.formats._FORMATS", {"Q8_0": None})
    with pytest.raises(UnsupportedFormatError, match="F32 has no kernels on a GPU: expected one of Q8_0"):
        linear(x, weight)


def test_activations_may_be_in_order_already():
    weight = DeviceTensor.of(packed("Q4_K", 64, 512)[0], DEVICE)
    form = device_format(FORMATS["Q4_K"], 512)
    x = torch.randn(3, 512, device=DEVICE)
    torch.testing.assert_close(linear(to_lanes(x, form), weight), linear(x, weight), rtol=1e-5, atol=1e-3)
    assert torch.equal(linear(to_thirds(x, form), weight), linear(x, weight))
    assert torch.equal(linear(to_lanes(x[:2], form), weight), linear(x[:2], weight))
    with pytest.raises(KernelError, match="in that of Q4_K"):
        linear(to_lanes(x, device_format(FORMATS["Q6_K"], 512)), weight)
    with pytest.raises(KernelError, match="in that of Q4_K"):
        linear(to_thirds(x, device_format(FORMATS["Q6_K"], 512)), weight)
    with pytest.raises(KernelError, match="expected 1 to"):
        linear(to_lanes(x[:2, :256], form), weight)
