"""MXFP4 experts of gpt-oss: stacks `[experts, rows, K]` in 32-weight blocks of e2m1 floats under an e8m0 scale.

`<name>_blocks` is U8 `[E, R, K / 32, 16]`, two neighbours a byte, `<name>_scales` U8 `[E, R, K / 32]`; a value is
e2m1(nibble) * 2^(scale - 127). The format MXFP4 has the same values with weight j + 16 above weight j. The rest of such
a checkpoint (attention, router, embedding, biases) is not quantised.

Source: the OCP Microscaling Formats specification 1.0, and openai/gpt-oss-20b on the hub.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.quant.formats import get_format
from moesaic.weights.checkpoint import Rows
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.base import Parts, QuantizedTensor, describe, row_chunks
from moesaic.weights.schemes.nibbles import check_shape

__all__ = ["find_mxfp4"]

_NAN_SCALE = 255
_LOW, _HIGH, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)


def find_mxfp4(parts: Parts) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint with `quant_method: mxfp4`."""
    for name, blocks in parts.ending("_blocks"):
        if blocks.dtype != "U8" or len(blocks.shape) < 3 or blocks.shape[-1] != 16:
            raise CheckpointError(
                blocks.file.path,
                f"is {blocks.dtype} {list(blocks.shape)}: expected U8 [experts, rows, K / 32, 16].",
                blocks.name,
            )
        scales = parts.partner(blocks, f"{name}_scales")
        check_shape(scales, ("U8",), blocks.shape[:-1], blocks)
        yield _tensor(name, blocks, scales)


def _tensor(name: str, blocks: StoredTensor, scales: StoredTensor) -> QuantizedTensor:
    *leading, num_blocks, _ = blocks.shape
    fmt, cols = get_format("MXFP4"), 32 * num_blocks

    def read(rows: Rows | None) -> np.ndarray:
        natural, exponents = blocks.raw().reshape(-1, 16 * num_blocks), scales.raw().reshape(-1, num_blocks)
        count, chunks = row_chunks(len(natural), cols, rows)
        result = np.empty((count, num_blocks), [("scale", np.uint8), ("codes", "V16")])
        for where, chosen in chunks:
            result["scale"][where] = exponents[chosen]
            result["codes"][where] = _parted(natural[chosen])
        if bool((result["scale"] == _NAN_SCALE).any()):
            raise CheckpointError(
                scales.file.path,
                "holds scales that are NaN: the checkpoint is damaged; download it again.",
                scales.name,
            )
        return result.view(np.uint8)

    return QuantizedTensor(describe(name, fmt, (*leading, cols), blocks.file.path), (blocks, scales), read)


def _parted(paired: np.ndarray) -> np.ndarray:
    """Nibbles 2 j and 2 j + 1 in a byte, uint8 `[rows, K / 2]`, as nibbles j and j + 16, V16 `[rows, K / 32]`."""
    words = paired.view("<u8").reshape(len(paired), -1, 2)
    first, second = words[..., 0], words[..., 1]
    result = np.empty((*first.shape, 16), np.uint8)
    result[..., 0::2] = (first & _LOW | (second & _LOW) << _FOUR).view(np.uint8).reshape(*first.shape, 8)
    result[..., 1::2] = ((first & _HIGH) >> _FOUR | second & _HIGH).view(np.uint8).reshape(*first.shape, 8)
    return result.view("V16")[..., 0]
