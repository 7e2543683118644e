"""Weights of 4 bits as blocks of the INT4, UINT4 and MXFP4 formats: reordered, never recomputed.

Checkpoints store eight consecutive weights in 32 bits, the first in the lowest four ("natural" order). Blocks have, for
every 32 weights, 16 bytes with weight j in the low and weight j + 16 in the high half of byte j (csrc/formats/int4.h).
"""

from __future__ import annotations

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.weights.safetensors_file import StoredTensor

__all__ = ["check_shape", "grouped_blocks", "grouped_format", "reordered", "unpacked"]

_GROUPS = (128, 64, 32)


def _spread(words: np.ndarray) -> np.ndarray:
    """Eight nibbles of 32 bits to eight bytes of 64."""
    x = words.astype(np.uint64)
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        x = (x | x << np.uint64(shift)) & np.uint64(mask)
    return x


def reordered(natural: np.ndarray) -> np.ndarray:
    """Nibbles in natural order, uint8 `[rows, K / 2]`, as the bytes that blocks have, `[rows, K / 32, 16]`."""
    words = np.ascontiguousarray(natural).view("<u4").reshape(len(natural), -1, 4)
    low, high = _spread(words[..., :2]), _spread(words[..., 2:])
    blocks: np.ndarray = (low | high << np.uint64(4)).astype("<u8", copy=False).view(np.uint8)
    return blocks


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
        nibbles: uint8 `[rows, K / 32, 16]`, as `reordered` gives them.
        scales: 16-bit `[rows, num_groups]`.
        zeros: uint8 `[rows, num_groups]`.

    Returns:
        uint8 `[rows, row_bytes]`.
    """
    half, num_rows = fmt.block_size // 2, len(nibbles)
    values = nibbles.reshape(num_rows, -1, half)
    repeats = values.shape[1] // scales.shape[1]
    result = np.empty((num_rows, values.shape[1], fmt.block_bytes), np.uint8)
    result[..., :half] = values
    bits = np.repeat(np.ascontiguousarray(scales), repeats, axis=1)
    result[..., half : half + 2] = bits[..., None].view(np.uint8)
    if zeros is not None:
        result[..., half + 2] = np.repeat(zeros, repeats, axis=1)
    return result.reshape(num_rows, -1)


def check_shape(stored: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], of: StoredTensor) -> None:
    """See that a part of the weight `of` has the dtype and the shape that it must have."""
    if stored.dtype not in dtypes or stored.shape != shape:
        raise CheckpointError(
            stored.file.path,
            f"is {stored.dtype} {list(stored.shape)}: expected {' or '.join(dtypes)} {list(shape)} beside '{of.name}' "
            f"of {list(of.shape)}.",
            stored.name,
        )
