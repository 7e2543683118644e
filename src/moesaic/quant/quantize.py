"""Float rows to blocks and back, on NumPy arrays.

Shapes and types are checked here, the work is done by the native extension on all threads. It does not know where the
rows come from; a tensor's name is only repeated in errors.
"""

from __future__ import annotations

import numpy as np

from moesaic import _native
from moesaic.errors import KernelError, QuantizationError, UnsupportedFormatError
from moesaic.quant.formats import FORMATS, WeightFormat

__all__ = ["WRITABLE_FORMATS", "dequantize", "quantize", "why_not_writable"]

WRITABLE_FORMATS: tuple[WeightFormat, ...] = tuple(
    fmt for fmt in FORMATS.values() if fmt.ggml_type in _native.writable_formats()
)
"""The formats that `quantize` can make."""


def why_not_writable(fmt: WeightFormat) -> str:
    """Why `quantize` cannot make a format, and which ones it can, without a full stop; "" if it can."""
    if fmt in WRITABLE_FORMATS:
        return ""
    names = ", ".join(each.name for each in WRITABLE_FORMATS)
    return f"{fmt.name} can be read but not written: choose one of {names}"


def quantize(
    x: np.ndarray, fmt: WeightFormat, importance: np.ndarray | None = None, name: str = "the tensor"
) -> np.ndarray:
    """Round float rows to a format, minimising the (weighted) squared error of every block.

    Scales and minima are searched by weighted least squares, so the error is below that of rounding to the nearest
    level between a block's extremes. Results do not depend on the machine or the number of threads.

    Args:
        x: float32 `[rows, cols]`.
        fmt: the format wanted, one of `WRITABLE_FORMATS`.
        importance: float32 `[cols]`, the weight of each column's squared error, e.g. the mean square of the
            activation that it multiplies; None weighs all alike.
        name: what to call the rows in an error.

    Returns:
        uint8 `[rows, fmt.row_bytes(cols)]`, the blocks as a GGUF file holds them.

    Raises:
        UnsupportedFormatError: the format cannot be written, or `cols` is not a multiple of its block size.
        QuantizationError: a weight is infinite, NaN or too large for the format, or `importance` has negative or
            non-finite values.
        KernelError: an array has the wrong shape or type.
    """
    problem = why_not_writable(fmt)
    if problem:
        raise UnsupportedFormatError(f"{name}: {problem}.")
    if x.ndim != 2 or x.dtype != np.float32:
        raise KernelError(f"{name}: quantize takes float32 [rows, cols], got {x.dtype} {list(x.shape)}.")
    rows, cols = x.shape
    source = np.ascontiguousarray(x)
    weights = None if importance is None else _checked_importance(importance, cols, name)
    blocks = np.empty((rows, fmt.row_bytes(cols)), dtype=np.uint8)
    bad_row = _native.quantize(
        fmt.ggml_type,
        rows,
        cols,
        blocks.shape[1],
        source.ctypes.data,
        blocks.ctypes.data,
        0 if weights is None else weights.ctypes.data,
    )
    if bad_row >= 0:
        raise _unrepresentable(source[bad_row], bad_row, fmt, name)
    return blocks


def dequantize(raw: np.ndarray, fmt: WeightFormat, cols: int) -> np.ndarray:
    """The weights that blocks stand for, bit for bit as `gguf.quants.dequantize` computes them.

    Args:
        raw: uint8 `[rows, fmt.row_bytes(cols)]`.
        fmt: the format of the blocks.
        cols: weights per row.

    Returns:
        float32 `[rows, cols]`.

    Raises:
        UnsupportedFormatError: `cols` is not a multiple of the block size.
        KernelError: `raw` has the wrong shape or type.
    """
    row_bytes = fmt.row_bytes(cols)
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] != row_bytes:
        raise KernelError(
            f"dequantize takes uint8 [rows, {row_bytes}] for rows of {cols} weights in {fmt.name}, "
            f"got {raw.dtype} {list(raw.shape)}."
        )
    source = np.ascontiguousarray(raw)
    values = np.empty((raw.shape[0], cols), dtype=np.float32)
    if values.size:
        _native.dequantize(fmt.ggml_type, raw.shape[0], cols, source.ctypes.data, values.ctypes.data)
    return values


def _checked_importance(importance: np.ndarray, cols: int, name: str) -> np.ndarray:
    """Importance as contiguous float32 without zeros: a block without any weight would have no best scale."""
    if importance.shape != (cols,):
        raise KernelError(f"{name}: importance has the shape {list(importance.shape)}: expected [{cols}].")
    weights = np.ascontiguousarray(importance, dtype=np.float32)
    mean = float(weights.mean(dtype=np.float64)) if cols else 1.0
    if not np.isfinite(mean) or weights.min(initial=0.0) < 0 or mean == 0:
        raise QuantizationError(f"{name}: importance must be finite, at least 0 and not all 0.")
    scaled = weights / np.float32(mean)  # only ratios matter, and squares of large weights must not overflow
    return scaled.clip(min=np.float32(1e-6))


def _unrepresentable(row: np.ndarray, index: int, fmt: WeightFormat, name: str) -> QuantizationError:
    """The error for a row that the native quantiser refused."""
    limit = _native.largest_magnitude(fmt.ggml_type)
    column = int(np.flatnonzero(~(np.abs(row) <= limit))[0])
    return QuantizationError(
        f"{name}: the weight at row {index}, column {column} is {row[column]}: {fmt.name} holds finite weights of "
        f"magnitude up to {limit:.6g}. The checkpoint is damaged, or this tensor needs BF16 or F32."
    )
