"""Weights at the edge of what a format holds, and input that must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.errors import KernelError, QuantizationError, UnsupportedFormatError
from moesaic.quant import WRITABLE_FORMATS, WeightFormat, dequantize, get_format, quantize

COLS = 512
formats = pytest.mark.parametrize("fmt", WRITABLE_FORMATS, ids=lambda fmt: fmt.name)


def round_trip(x: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    return dequantize(quantize(x, fmt), fmt, x.shape[1])


@formats
def test_zeros_stay_zeros(fmt: WeightFormat) -> None:
    np.testing.assert_array_equal(round_trip(np.zeros((2, COLS), np.float32), fmt), 0)


@formats
@pytest.mark.parametrize("value", [1.0, -1.0, 0.02, -3e-3])
def test_constants_stay_constant(fmt: WeightFormat, value: float) -> None:
    values = round_trip(np.full((2, COLS), value, np.float32), fmt)
    # Scales of -3e-3 are subnormal float16; MXFP4 has the significands 1 and 1.5 only.
    np.testing.assert_allclose(values, value, rtol=0.2 if fmt.name == "MXFP4" else 1e-2)
    assert len(np.unique(values)) == 1


@formats
def test_one_sub_block_of_weights_among_zeros(fmt: WeightFormat) -> None:
    x = np.zeros((1, COLS), np.float32)
    x[0, 32:64] = np.linspace(-1, 1, 32)
    values = round_trip(x, fmt)
    np.testing.assert_array_equal(values[:, :32], 0)
    np.testing.assert_array_equal(values[:, 64:], 0)
    np.testing.assert_allclose(values, x, atol=0.4)


@formats
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e-7])
def test_tiny_weights_never_grow(fmt: WeightFormat, scale: float) -> None:
    """Where float16 scales end, weights become zero; nothing overflows on the way."""
    x = (np.random.default_rng(1).standard_normal((4, COLS)) * scale).astype(np.float32)
    values = round_trip(x, fmt)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 2 * np.abs(x).max() + 1e-45


@formats
def test_small_weights_keep_their_precision(fmt: WeightFormat) -> None:
    """At 1e-4 the scales of the K-formats are subnormal in float16."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((16, COLS)).astype(np.float32)
    usual = np.abs(round_trip(x, fmt) - x).mean()
    small = np.abs(round_trip(x * np.float32(1e-3), fmt) - x * np.float32(1e-3)).mean() * 1e3
    assert small < 1.25 * usual + 1e-6


@formats
def test_a_huge_outlier_survives(fmt: WeightFormat) -> None:
    x = (np.random.default_rng(3).standard_normal((4, COLS)) * 0.02).astype(np.float32)
    x[:, 100], x[:, 300] = 1000.0, -1000.0
    values = round_trip(x, fmt)
    np.testing.assert_allclose(values[:, 100], 1000, rtol=0.05)
    np.testing.assert_allclose(values[:, 300], -1000, rtol=0.05)


@formats
def test_the_largest_weights_allowed(fmt: WeightFormat) -> None:
    x = np.where(np.random.default_rng(4).random((4, COLS)) < 0.5, -65504, 65504).astype(np.float32)
    np.testing.assert_allclose(round_trip(x, fmt), x, rtol=0.13)  # Q4_0: level 7 of 8 where signs mix


@formats
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_by_name(fmt: WeightFormat, value: float) -> None:
    x = np.zeros((300, COLS), np.float32)
    x[123, 45] = value
    x[200, 7] = value
    with pytest.raises(QuantizationError, match=rf"blk.3.ffn_up: the weight at row 123, column 45 is {value}"):
        quantize(x, fmt, name="blk.3.ffn_up")


@formats
def test_weights_beyond_float16_are_refused_where_they_do_not_fit(fmt: WeightFormat) -> None:
    x = np.full((1, COLS), 70000.0, np.float32)
    if fmt.name in {"F32", "BF16"}:
        np.testing.assert_allclose(round_trip(x, fmt), x, rtol=4e-3)
    else:
        with pytest.raises(QuantizationError, match=f"{fmt.name} holds finite weights of magnitude up to 65504"):
            quantize(x, fmt)


def test_the_largest_floats_do_not_round_to_infinity_in_bfloat16() -> None:
    x = np.full((1, 8), np.finfo(np.float32).max, np.float32)
    with pytest.raises(QuantizationError, match="BF16"):
        quantize(x, get_format("BF16"))


def test_wrong_arrays_are_refused() -> None:
    fmt = get_format("Q4_K")
    with pytest.raises(UnsupportedFormatError, match="a row of 300"):
        quantize(np.zeros((1, 300), np.float32), fmt)
    with pytest.raises(KernelError, match=r"float32 \[rows, cols\], got float64"):
        quantize(np.zeros((1, 256)), fmt)
    with pytest.raises(KernelError, match=r"got float32 \[256\]"):
        quantize(np.zeros(256, np.float32), fmt)


@pytest.mark.parametrize("importance", [np.full(256, -1.0), np.full(256, np.nan), np.zeros(256), np.full(256, np.inf)])
def test_importance_without_meaning_is_refused(importance: np.ndarray) -> None:
    with pytest.raises(QuantizationError, match="importance must be finite, at least 0 and not all 0"):
        quantize(np.ones((1, 256), np.float32), get_format("Q4_K"), importance.astype(np.float32))


def test_importance_of_another_length_is_refused() -> None:
    with pytest.raises(KernelError, match=r"shape \[128\]: expected \[256\]"):
        quantize(np.ones((1, 256), np.float32), get_format("Q4_K"), np.ones(128, np.float32))


def test_columns_of_no_importance_do_not_break_blocks() -> None:
    x = np.random.default_rng(6).standard_normal((2, COLS)).astype(np.float32)
    importance = np.ones(COLS, np.float32)
    importance[64:352] = 0
    for fmt in WRITABLE_FORMATS:
        values = dequantize(quantize(x, fmt, importance), fmt, COLS)
        assert np.isfinite(values).all()
        assert np.abs(values - x).max() < 2.5


def test_rows_that_are_not_contiguous() -> None:
    x = np.random.default_rng(8).standard_normal((4, COLS)).astype(np.float32)
    fmt = get_format("Q5_K")
    np.testing.assert_array_equal(quantize(x[::2], fmt), quantize(x[::2].copy(), fmt))
    np.testing.assert_array_equal(quantize(np.asfortranarray(x), fmt), quantize(x, fmt))


def test_no_rows_give_no_blocks() -> None:
    assert quantize(np.empty((0, 256), np.float32), get_format("Q4_K")).shape == (0, 144)
