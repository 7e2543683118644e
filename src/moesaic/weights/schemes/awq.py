"""AWQ checkpoints (AutoAWQ, version "gemm"): 4 bits with zero points, groups along K, packed along N.

`<module>.qweight` I32 `[K, N / 8]`, `qzeros` I32 `[K / group, N / 8]`, `scales` F16 or BF16 `[K / group, N]`. Nibble p
of a word (the lowest is 0) belongs to row 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[p]. A value is (q - z) * scale.

Source: the AutoAWQ package (`WQLinear_GEMM.from_linear`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.weights.checkpoint import Rows
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.base import Parts, QuantizedTensor, describe, row_chunks
from moesaic.weights.schemes.nibbles import check_shape, grouped_blocks, grouped_format, unpacked

__all__ = ["find_awq"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # to which row 8 j + i nibble p of a word belongs
_PLACES = np.argsort(_ORDER)  # and the inverse


def find_awq(parts: Parts) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint with `quant_method: awq`."""
    bits, version = parts.integer("bits", "w_bit"), parts.config.get("version") or "gemm"
    if bits != 4:
        raise parts.refuse(f"AWQ with {bits} bits", "4 bits")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise parts.refuse(f"AWQ of the version {reprlib.repr(version)}", "gemm")
    for module, qweight in parts.ending(".qweight"):
        yield _tensor(parts, module, qweight)


def _tensor(parts: Parts, module: str, qweight: StoredTensor) -> QuantizedTensor:
    if qweight.dtype != "I32" or len(qweight.shape) != 2:
        raise CheckpointError(
            qweight.file.path, f"is {qweight.dtype} {list(qweight.shape)}: expected I32 [K, N / 8].", qweight.name
        )
    cols, num_rows = qweight.shape[0], 8 * qweight.shape[1]
    scales = parts.partner(qweight, f"{module}.scales")
    num_groups = scales.shape[0] if len(scales.shape) == 2 else 0
    check_shape(scales, ("F16", "BF16"), (num_groups, num_rows), qweight)
    zeros = parts.partner(qweight, f"{module}.qzeros")
    check_shape(zeros, ("I32",), (num_groups, num_rows // 8), qweight)
    fmt = grouped_format(scales, cols, num_groups, has_zero_points=True)

    def read(rows: Rows | None) -> np.ndarray:
        words, points, bits = qweight.array(), _rows_of(zeros.array()), scales.array().T
        count, chunks = row_chunks(num_rows // 8, 8 * cols, None)
        result = np.empty((8 * count, fmt.row_bytes(cols)), np.uint8)
        for where, chosen in chunks:  # whole words: eight rows each
            eight = slice(8 * where.start, 8 * where.start + 8 * len(chosen))
            result[eight] = grouped_blocks(fmt, _paired(words[:, where]), bits[eight], points[eight])
        return result if rows is None else result[rows]

    return QuantizedTensor(
        describe(f"{module}.weight", fmt, (num_rows, cols), qweight.file.path), (qweight, scales, zeros), read
    )


def _rows_of(words: np.ndarray) -> np.ndarray:
    """Words `[K, n]` as nibbles of rows, uint8 `[8 n, K]`."""
    nibbles = unpacked(words)[..., _PLACES]  # [K, n, 8]
    return np.ascontiguousarray(nibbles.transpose(1, 2, 0)).reshape(-1, len(words))


def _paired(words: np.ndarray) -> np.ndarray:
    """Words `[K, n]` as rows with two neighbours along K a byte, uint8 `[8 n, K / 2]`."""
    cols, num_words = words.shape
    columns = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8).reshape(cols, -1).T)  # [4 n, K]
    two = columns.view("<u2").reshape(num_words, 4, -1)  # weights k and k + 1 of two rows each
    result = np.empty((num_words, 8, cols // 2), np.uint8)
    result[:, _ORDER[0::2]] = two & 0x0F | two >> 4 & 0xF0
    result[:, _ORDER[1::2]] = two >> 4 & 0x0F | two >> 8 & 0xF0
    return result.reshape(8 * num_words, -1)
