"""Packing keeps every bit, and values are those of `gguf.quants`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed, random_raw, weights_of

from moesaic import _native
from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.kernels import PackedTensor, SlicedTensor, gather_rows
from moesaic.quant import FORMATS, recode

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


def _index_fields(name: str, raw: np.ndarray) -> np.ndarray:
    """Indices [rows, entries] of blocks, one a row, as ggml lays them out."""
    if name == "IQ2_XS":
        return raw[:, 2:66].copy().view(np.uint16) & 511
    low, bits = (raw[:, 2:34], 2) if name == "IQ2_S" else (raw[:, 2:66], 1)
    high = raw[:, 66:74].repeat(8 // bits, axis=1) >> np.tile(np.arange(0, 8, bits), 8) & (1 << bits) - 1
    return low.astype(np.uint16) | high.astype(np.uint16) << 8


def _numbers_in_tile(name: str, tile: np.ndarray) -> np.ndarray:
    """Numbers [16, entries] of entries in a tile of 16 blocks."""

    def field(start: int, num_bytes: int, unit: int) -> np.ndarray:
        part = tile[16 * start : 16 * (start + num_bytes)].reshape(-1, 16, unit)
        return part.transpose(1, 0, 2).reshape(16, num_bytes)

    if name == "IQ2_XS":
        return field(0, 32, 4) | (field(32, 32, 4) >> 7).astype(np.uint16) << 8
    width, bits, at = (32, 2, 64) if name == "IQ2_S" else (64, 1, 96)
    high = field(at, 8, 1).repeat(8 // bits, axis=1) >> np.tile(np.arange(0, 8, bits), 8) & (1 << bits) - 1
    return field(0, width, 4) | high.astype(np.uint16) << 8


@pytest.mark.parametrize(("name", "size"), [("IQ2_XS", 512), ("IQ2_S", 1024), ("IQ3_S", 512)])
def test_tiles_name_entries_of_grids_by_numbers_of_their_own(name, size):
    fmt = FORMATS[name]
    places = np.array(_native.grid_places(fmt.ggml_type))
    assert sorted(places) == list(range(size))
    raw = random_raw(fmt, 16, 256)
    tensor = PackedTensor.empty(fmt, 16, 256)
    tensor.pack_(0, raw)
    numbers = _numbers_in_tile(name, tensor.data.numpy())
    assert np.array_equal(places[numbers], _index_fields(name, raw))


def test_other_formats_keep_the_indices_of_blocks():
    assert [name for name, fmt in FORMATS.items() if _native.grid_places(fmt.ggml_type)] == ["IQ2_XS", "IQ2_S", "IQ3_S"]


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M"])
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_blocks_are_recoded_while_they_are_packed(name, axis):
    source, form, rows, cols = FORMATS[name], FORMATS[f"{name}_TERNARY"], 53, 512
    raw = random_raw(source, rows, cols)
    whole = PackedTensor.empty(form, rows, cols)
    whole.pack_(0, raw, source)
    assert np.array_equal(whole.unpack(), recode(raw, source, form, cols))
    assert np.array_equal(whole.dequantize()[0].numpy(), weights_of(raw, source, cols))
    shapes = [(32, cols), (21, cols)] if axis == "rows" else [(rows, 256), (rows, 256)]
    cut = SlicedTensor(tuple(PackedTensor.empty(form, *shape) for shape in shapes), axis)
    cut.pack_(0, raw, source)
    assert np.array_equal(cut.unpack(), whole.unpack())


def test_only_what_a_format_is_another_form_of_is_recoded():
    raw = np.zeros((16, 56), np.uint8)
    with pytest.raises(KernelError, match="Rows of IQ1_M cannot be packed as IQ1_S_TERNARY"):
        PackedTensor.empty(FORMATS["IQ1_S_TERNARY"], 16, 256).pack_(0, raw, FORMATS["IQ1_M"])
    with pytest.raises(KernelError, match="Rows of IQ1_S_TERNARY cannot be packed as IQ1_S"):
        PackedTensor.empty(FORMATS["IQ1_S"], 16, 256).pack_(0, raw, FORMATS["IQ1_S_TERNARY"])
    with pytest.raises(ValueError, match="IQ1_S_TERNARY is no other form of IQ1_M"):
        _native.pack(FORMATS["IQ1_S_TERNARY"].ggml_type, 16, 256, raw.ctypes.data, 56, 0, FORMATS["IQ1_M"].ggml_type)


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
