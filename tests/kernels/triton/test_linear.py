"""Products of packed weights on a GPU against float64, on values that `gguf.quants` or a definition gives."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.oracle import packed, tokens
from tests.kernels.triton.conftest import DEVICE

from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.formats import supported_formats
from moesaic.kernels.triton.linear import linear
from moesaic.quant import FORMATS

# In float32: a sum of a few hundred products. In bfloat16, on a GPU: two roundings to 8 bits each.
FLOAT_TOLERANCE = 2e-6
BFLOAT16_TOLERANCE = 1e-2


def tolerance(fmt: str, num_tokens: int) -> float:
    if num_tokens <= 8:
        return FLOAT_TOLERANCE
    return BFLOAT16_TOLERANCE if DEVICE == "cuda" and fmt != "F32" else FLOAT_TOLERANCE


def check(fmt: str, rows: int, cols: int, num_tokens: int, **options: object) -> None:
    weight, values = packed(fmt, rows, cols)
    x = tokens(num_tokens, cols)
    result = linear(x.to(DEVICE), DeviceTensor.of(weight, DEVICE), **options)
    expected = x.double().numpy() @ values[0].T
    error = np.abs(result.cpu().double().numpy() - expected).max() / np.abs(expected).max()
    assert result.shape == (num_tokens, rows) and error < tolerance(fmt, num_tokens), error


def columns(fmt: str) -> list[int]:
    block = FORMATS[fmt].block_size
    return [1, 2, 37, 300] if block == 1 else [block, 3 * block]


@pytest.mark.parametrize("fmt", supported_formats())
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_products_are_those_of_the_values(fmt, num_tokens):
    for cols in columns(fmt):
        check(fmt, 35, cols, num_tokens)
