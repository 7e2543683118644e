"""Packing keeps every bit, and values are those of `gguf.quants`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed, random_raw, weights_of

from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.kernels import PackedTensor, gather_rows
from moesaic.quant import FORMATS

ROWS = [1, 16, 17, 53]


def columns(name: str) -> list[int]:
    block = FORMATS[name].block_size
    return [1, 2, 7, 64] if block == 1 else [block, 3 * block]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", ROWS)
def test_unpacking_gives_the_bytes_that_were_packed(name, rows):
    fmt = FORMATS[name]
    for cols in columns(name):
        tensor = PackedTensor.empty(fmt, rows, cols, num_matrices=2)
        for index in range(2):
            wide = np.zeros((rows, fmt.row_bytes(cols) + 13), np.uint8)  # rows further apart than they are long
            raw = wide[:, : fmt.row_bytes(cols)]
            raw[:] = np.random.default_rng(index).integers(0, 256, raw.shape)
            tensor.pack_(index, raw)
            assert np.array_equal(tensor.unpack(index), raw)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_matrix_takes_the_bytes_of_its_padded_rows(name):
    fmt = FORMATS[name]
    for rows in ROWS:
        for cols in columns(name):
            expected = (rows + 15) // 16 * 16 * fmt.row_bytes(cols)
            assert PackedTensor.empty(fmt, rows, cols).nbytes == (expected + 63) // 64 * 64


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_bit_exact_with_gguf(name):
    fmt, rows, cols = FORMATS[name], 33, columns(name)[-1]
    tensor = PackedTensor.empty(fmt, rows, cols)
    raw = random_raw(fmt, rows, cols)
    tensor.pack_(0, raw)
    expected = weights_of(raw, fmt, cols)
    assert np.array_equal(tensor.dequantize()[0].numpy().view(np.uint32), expected.view(np.uint32))
    ids = torch.tensor([[0, 32, 5], [17, 17, 1]])
    assert np.array_equal(gather_rows(ids, tensor).numpy().view(np.uint32), expected[ids.numpy()].view(np.uint32))


def test_packed_bytes_of_4_bits_are_operands_of_a_dot_product():
    """The layout that docs/architecture.md promises: 64-byte vectors of 16 rows x 4 k, scales after them."""
    fmt = FORMATS["Q4_0"]
    raw = random_raw(fmt, 16, 32)
    tensor = PackedTensor.empty(fmt, 16, 32)
    tensor.pack_(0, raw)
    tile = tensor.data.numpy()
    quads = tile[:256].reshape(4, 16, 4)  # [vector, row, k]
    assert np.array_equal(quads.transpose(1, 0, 2).reshape(16, 16), raw[:, 2:])
    assert np.array_equal(tile[256:288].reshape(16, 2), raw[:, :2])


def test_gather_refuses_ids_outside_the_matrix():
    tensor, _ = packed("Q8_0", 20, 32)
    for bad in (-1, 20):
        with pytest.raises(KernelError, match=str(bad)):
            gather_rows(torch.tensor([0, bad]), tensor)
    with pytest.raises(KernelError, match="int64"):
        gather_rows(torch.tensor([0], dtype=torch.int32), tensor)


def test_wrong_shapes_are_refused():
    fmt = FORMATS["Q4_K"]
    with pytest.raises(UnsupportedFormatError, match="256"):
        PackedTensor.empty(fmt, 16, 128)
    with pytest.raises(KernelError, match="at least 1"):
        PackedTensor.empty(fmt, 0, 256)
    tensor = PackedTensor.empty(fmt, 16, 256)
    with pytest.raises(KernelError, match=r"\[16, 144\]"):
        tensor.pack_(0, np.zeros((15, 144), np.uint8))
    with pytest.raises(KernelError, match="Matrix 1"):
        tensor.pack_(1, np.zeros((16, 144), np.uint8))
    with pytest.raises(KernelError, match="aligned"):
        PackedTensor(fmt, 1, 16, 256, torch.empty(3000, dtype=torch.uint8)[1:])
