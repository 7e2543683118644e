"""FP8 (e4m3) weights with float scales: DeepSeek's 128 x 128 blocks, one scale per row, one per tensor.

`<name>` is F8_E4M3 `[..., N, K]`; `<name>_scale_inv` (or `<name>_scale`) holds what the values are multiplied with:
`[..., ceil(N / rows), ceil(K / cols)]` for blocks, `[N]` or `[N, 1]` per row, a single value per tensor. Scales of
activations may come with it: they are not used, because activations stay floats here.

Sources: the `quantization_config` and the conversion script of deepseek-ai/DeepSeek-V3 on the hub (`weight_dequant`),
and the compressed-tensors package (scheme "float-quantized").
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.weights.checkpoint import Rows
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.base import Parts, QuantizedTensor, describe, float_values, row_chunks

__all__ = ["Block", "find_e4m3", "find_fp8"]

Block = tuple[int, int]
"""Rows and columns that share a scale."""

_EXTRAS = ("input_scale", "activation_scale", "input_scale_inv", "activation_scale_inv")


def find_fp8(parts: Parts) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint with `quant_method: fp8`."""
    if parts.config.get("fmt", "e4m3") != "e4m3":
        raise parts.refuse(f"FP8 of the format {reprlib.repr(parts.config['fmt'])}", "e4m3")
    yield from find_e4m3(parts, _block(parts))


def find_e4m3(parts: Parts, block: Block | None) -> Iterator[QuantizedTensor]:
    """Every F8_E4M3 tensor with its scales.

    Args:
        parts: the checkpoint.
        block: rows and columns that share a scale; None for scales per row or per tensor.
    """
    for name, stored in parts.tensors.items():
        if stored.dtype != "F8_E4M3":
            continue
        if len(stored.shape) < 2:
            raise CheckpointError(
                stored.file.path, f"has the shape {list(stored.shape)}: expected a matrix or a stack of them.", name
            )
        scale_name = f"{name}_scale" if f"{name}_scale" in parts.tensors else f"{name}_scale_inv"
        yield _tensor(parts, stored, parts.partner(stored, scale_name), block)


def _block(parts: Parts) -> Block | None:
    value = parts.config.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 1 << 16 for n in value):
        raise CheckpointError(
            parts.file, f"is {reprlib.repr(value)}: expected two sizes.", "quantization_config.weight_block_size"
        )
    return value[0], value[1]


def _format(stored: StoredTensor, block: Block | None) -> WeightFormat:
    """The format with the largest blocks that fit rows and scales."""
    cols, shared = stored.shape[-1], stored.shape[-1] if block is None else block[1]
    for fmt in (get_format("FP8"), get_format("FP8_32")):
        if cols % fmt.block_size == 0 and shared % fmt.block_size == 0:
            return fmt
    raise UnsupportedFormatError(
        f"{stored.file.path}: '{stored.name}': has rows of {cols} FP8 weights, a scale for every {shared}: expected "
        "multiples of 32; use a GGUF of this model."
    )


def _tensor(parts: Parts, stored: StoredTensor, scales: StoredTensor, block: Block | None) -> QuantizedTensor:
    *_, num_rows, cols = stored.shape
    leading = stored.shape[:-2]
    if block is not None:
        expected = [(*leading, -(-num_rows // block[0]), -(-cols // block[1]))]
    else:
        expected = [(*leading, num_rows, 1), (*leading, num_rows), (1,), ()]
        block = (num_rows, cols) if scales.shape in ((1,), ()) else (1, cols)
    if scales.shape not in expected:
        raise CheckpointError(
            scales.file.path,
            f"has the shape {list(scales.shape)}: expected {' or '.join(str(list(shape)) for shape in expected)} "
            f"beside {list(stored.shape)}.",
            scales.name,
        )
    float_values(scales)  # refuses a dtype that cannot be read
    fmt = _format(stored, block)
    extras = parts.present(*(f"{stored.name.rpartition('.')[0]}.{extra}" for extra in _EXTRAS))

    def read(rows: Rows | None) -> np.ndarray:
        return _blocks(stored, scales, block, fmt, rows)

    return QuantizedTensor(describe(stored.name, fmt, stored.shape, stored.file.path), (stored, scales, *extras), read)


def _blocks(
    stored: StoredTensor, scales: StoredTensor, block: Block, fmt: WeightFormat, rows: Rows | None
) -> np.ndarray:
    """Blocks of e4m3 codes with the scale that each has, uint8 `[rows, row_bytes]`."""
    *_, num_rows, cols = stored.shape
    size, num_blocks = fmt.block_size, cols // fmt.block_size
    codes = stored.array().reshape(-1, num_blocks, size)
    table = float_values(scales).reshape(-1, max(1, -(-cols // block[1])))
    table_rows = -(-num_rows // block[0]) if table.shape[0] > 1 else 0  # of each matrix of a stack
    table_cols = np.arange(num_blocks) * size // block[1]
    count, chunks = row_chunks(len(codes), cols, rows)
    result = np.empty((count, num_blocks), [("codes", f"V{size}"), ("scale", "<f4")])
    for where, chosen in chunks:
        piece = codes[chosen]
        if bool(((piece & 0x7F) == 0x7F).any()):
            raise CheckpointError(
                stored.file.path,
                "holds weights that are NaN: the checkpoint is damaged; download it again.",
                stored.name,
            )
        result["codes"][where] = piece.view(f"V{size}")[..., 0]
        table_row = chosen // num_rows * table_rows + chosen % num_rows // block[0]
        result["scale"][where] = table[table_row][:, table_cols]
    return result.view(np.uint8)
