"""Weights of 4 bits as blocks of the INT4 and UINT4 formats: copied, never recomputed.

Checkpoints store eight consecutive weights in 32 bits, the first in the lowest four, so two neighbours share a byte.
Blocks have the same order (csrc/formats/int4.h).
"""

from __future__ import annotations

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.weights.safetensors_file import StoredTensor

__all__ = ["check_shape", "grouped_blocks", "grouped_format", "unpacked"]

_GROUPS = (128, 64, 32)


def unpacked(words: np.ndarray) -> np.ndarray:
    """32-bit words `[..., n]` as nibbles, uint8 `[..., n, 8]`, the lowest first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (words.astype(np.uint32)[..., None] >> shifts & np.uint32(15)).astype(np.uint8)


def grouped_format(scales: StoredTensor, cols: int, num_groups: int, has_zero_points: bool) -> WeightFormat:
    """The format for rows of `cols` weights in `num_groups` groups; a longer group becomes several with equal scales.

    Raises:
        CheckpointError: the groups do not divide the row.
        UnsupportedFormatError: groups or scales are of a kind that no format has.
    """
    if num_groups < 1 or cols % num_groups:
        raise CheckpointError(
            scales.file.path, f"has {num_groups} scales for rows of {cols} weights: expected a divisor.", scales.name
        )
    group = next((size for size in _GROUPS if cols // num_groups % size == 0), None)
    if group is None or scales.dtype not in ("F16", "BF16"):
        raise UnsupportedFormatError(
            f"{scales.file.path}: '{scales.name}': has {scales.dtype} scales for groups of {cols // num_groups} "
            "weights: expected F16 or BF16 and a multiple of 32; use a GGUF of this model."
        )
    return get_format(f"{'UINT4' if has_zero_points else 'INT4'}_{group}_{scales.dtype}")


def grouped_blocks(fmt: WeightFormat, nibbles: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """Blocks of an INT4 (no `zeros`) or UINT4 format.

    Args:
        fmt: from `grouped_format`.
        nibbles: uint8 `[rows, K / 2]`, two neighbours a byte, the first in its low half.
        scales: 16-bit `[rows, num_groups]`.
        zeros: uint8 `[rows, num_groups]`.

    Returns:
        uint8 `[rows, row_bytes]`.
    """
    codes = f"V{fmt.block_size // 2}"
    fields = [("codes", codes), ("scale", scales.dtype), ("zero", np.uint8)]
    values = nibbles.view(codes)
    repeats = values.shape[1] // scales.shape[1]
    blocks = np.empty(values.shape, np.dtype(fields if zeros is not None else fields[:2]))
    blocks["codes"] = values
    blocks["scale"] = np.repeat(scales, repeats, axis=1)
    if zeros is not None:
        blocks["zero"] = np.repeat(zeros, repeats, axis=1)
    return blocks.view(np.uint8)


def check_shape(stored: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], of: StoredTensor) -> None:
    """See that a part of the weight `of` has the dtype and the shape that it must have."""
    if stored.dtype not in dtypes or stored.shape != shape:
        raise CheckpointError(
            stored.file.path,
            f"is {stored.dtype} {list(stored.shape)}: expected {' or '.join(dtypes)} {list(shape)} beside '{of.name}' "
            f"of {list(of.shape)}.",
            stored.name,
        )
