"""Other forms of formats: blocks with the same values, made from a file's blocks, that are faster to multiply.

Which there are and what they look like is the native extension's business (`csrc/formats`). Here they are found, and
rows of blocks are recoded for those who do not pack them at once, as `kernels.PackedTensor.pack_` does.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.quant.formats import FORMATS, WeightFormat

__all__ = ["other_form", "recode"]

_FORMS = MappingProxyType({form.recodes: form for form in FORMATS.values() if form.recodes is not None})


def other_form(fmt: WeightFormat) -> WeightFormat | None:
    """The format that holds the blocks of `fmt` in another form; None if there is none."""
    return _FORMS.get(fmt.ggml_type)


def recode(raw: np.ndarray, source: WeightFormat, form: WeightFormat, cols: int) -> np.ndarray:
    """Rows of blocks in their other form, with the same values to the bit.

    Args:
        raw: uint8 `[rows, source.row_bytes(cols)]`, contiguous along a row.
        source: the format of the blocks.
        form: its other form.
        cols: weights per row.

    Returns:
        uint8 `[rows, form.row_bytes(cols)]`.

    Raises:
        UnsupportedFormatError: `cols` is not a multiple of the block size.
        KernelError: `form` is no other form of `source`, or `raw` has the wrong shape or type.
    """
    rows, row_bytes = len(raw), source.row_bytes(cols)
    if form.recodes != source.ggml_type:
        raise KernelError(f"{form.name} is no other form of {source.name}.")
    if raw.dtype != np.uint8 or raw.shape != (rows, row_bytes) or raw.strides[1] != 1:
        raise KernelError(
            f"recode takes uint8 [rows, {row_bytes}], contiguous along a row, for rows of {cols} weights in "
            f"{source.name}, got {raw.dtype} {list(raw.shape)}."
        )
    result = np.empty((rows, form.row_bytes(cols)), np.uint8)
    if rows:
        packed = np.empty(_native.packed_nbytes(form.ggml_type, rows, cols), np.uint8)
        numbers = (form.ggml_type, rows, cols)
        _native.pack(*numbers, raw.ctypes.data, raw.strides[0], packed.ctypes.data, source.ggml_type)
        _native.unpack(*numbers, packed.ctypes.data, result.ctypes.data)
    return result
