"""Dequantised blocks, bit for bit against gguf.quants, or for formats that it lacks against their definition."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from tests.quant.own_formats import own_values

from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.quant import FORMATS, WeightFormat, dequantize, get_format


def assert_same_bits(ours: np.ndarray, oracle: np.ndarray) -> None:
    """Equal bit patterns, where any NaN stands for any other (their payload is the processor's choice)."""
    nan = np.isnan(oracle)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], oracle.view(np.uint32)[~nan])


def oracle(raw: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        if not fmt.in_gguf:
            return own_values(raw, fmt)
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt.name]).astype(np.float32)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("rows", "num_blocks"), [(1, 1), (5, 3), (300, 2)])
def test_blocks_of_random_bytes(name: str, rows: int, num_blocks: int) -> None:
    fmt = get_format(name)
    raw = np.random.default_rng(7).integers(0, 256, (rows, num_blocks * fmt.block_bytes), dtype=np.uint8)
    assert_same_bits(dequantize(raw, fmt, num_blocks * fmt.block_size), oracle(raw, fmt))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x3C])
def test_blocks_of_equal_bytes(name: str, fill: int) -> None:
    fmt = get_format(name)
    raw = np.full((2, 2 * fmt.block_bytes), fill, dtype=np.uint8)
    assert_same_bits(dequantize(raw, fmt, 2 * fmt.block_size), oracle(raw, fmt))


def test_every_float16_and_bfloat16_value() -> None:
    raw = np.arange(65536, dtype=np.uint16).reshape(64, 1024).view(np.uint8)
    assert_same_bits(dequantize(raw, get_format("F16"), 1024), raw.view(np.float16).astype(np.float32))
    bits = raw.view(np.uint16).astype(np.uint32) << 16
    assert_same_bits(dequantize(raw, get_format("BF16"), 1024), bits.view(np.float32))


def test_rows_that_are_not_contiguous() -> None:
    fmt = get_format("Q6_K")
    raw = np.random.default_rng(3).integers(0, 256, (6, 2 * fmt.block_bytes), dtype=np.uint8)
    assert_same_bits(dequantize(raw[::2], fmt, 512), oracle(raw, fmt)[::2])


def test_no_rows_give_no_rows() -> None:
    assert dequantize(np.empty((0, 144), np.uint8), get_format("Q4_K"), 256).shape == (0, 256)


def test_wrong_arguments_are_refused() -> None:
    fmt = get_format("Q4_K")
    with pytest.raises(KernelError, match=r"uint8 \[rows, 144\].*got uint8 \[2, 143\]"):
        dequantize(np.zeros((2, 143), np.uint8), fmt, 256)
    with pytest.raises(KernelError, match="got int8"):
        dequantize(np.zeros((2, 144), np.int8), fmt, 256)
    with pytest.raises(UnsupportedFormatError, match="a row of 255"):
        dequantize(np.zeros((2, 144), np.uint8), fmt, 255)
