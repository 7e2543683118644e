"""Rows that a GPU looks up in packed matrices are the values that `gguf.quants` or a definition gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.formats import supported_formats
from moesaic.kernels.triton.gather import gather_rows
from moesaic.quant import FORMATS

# Scales are multiplied in another order than the reference does.
TOLERANCE = 3e-7


@pytest.mark.parametrize("fmt", supported_formats())
def test_rows_are_those_of_the_values(fmt):
    block = FORMATS[fmt].block_size
    for cols in [1, 37] if block == 1 else [2 * block]:
        weight, values = packed(fmt, 35, cols, num_matrices=2)
        index = torch.tensor([34, 0], device=DEVICE)
        rows = gather_rows(index, DeviceTensor.of(weight, DEVICE), matrix=1)
        expected = values[1][index.cpu().numpy()]
        assert rows.dtype == torch.float32
        assert np.abs(rows.cpu().numpy() - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_ids_outside_the_matrix_read_nothing_else():
    weight, values = packed("Q4_K", 20, 256)
    rows = gather_rows(torch.tensor([-1, 20, 10**9], device=DEVICE), DeviceTensor.of(weight, DEVICE)).cpu().numpy()
    assert np.abs(rows - values[0][[0, 19, 19]]).max() <= TOLERANCE * np.abs(values).max()


def test_wrong_indices_are_refused():
    weight = DeviceTensor.of(packed("F32", 20, 32)[0], DEVICE)
    with pytest.raises(KernelError, match="int32 or int64"):
        gather_rows(torch.zeros(3, device=DEVICE), weight)
    with pytest.raises(KernelError, match="Matrix 1"):
        gather_rows(torch.tensor([0], device=DEVICE), weight, matrix=1)
