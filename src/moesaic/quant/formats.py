"""What a weight format is: its name, its number in a GGUF file and the size of its blocks.

The table comes from the native extension (`csrc/formats/formats.h` is the one list). This module knows neither how a
block is laid out nor how weights are rounded to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moesaic import _native
from moesaic.errors import UnsupportedFormatError

__all__ = ["FORMATS", "WeightFormat", "format_from_ggml", "format_from_safetensors_dtype", "get_format"]


_FIRST_OWN_NUMBER = 1000


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A way to store the rows of a weight matrix.

    Attributes:
        name: ggml's name, e.g. "Q4_K" or "BF16", or one of our own for formats that only safetensors hold.
        ggml_type: its number in a GGUF file, which is also the id that the native extension takes; of formats that no
            GGUF file holds a number from 1000 on.
        block_size: weights per block along a row; 1 for floats.
        block_bytes: bytes per block.
        is_quantized: whether weights share scales, so that writing them needs a quantiser; False for plain floats.
        rounds_activations: whether its products round activations to int8; those of the others keep them in float32.
        recodes: the number of the format whose blocks it holds in another form, with the same values; None if it is no
            such form. Only memory has blocks of such a format, no file.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    is_quantized: bool
    rounds_activations: bool
    recodes: int | None = None

    @property
    def in_gguf(self) -> bool:
        """Whether GGUF files can hold it."""
        return self.ggml_type < _FIRST_OWN_NUMBER

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights.

        Raises:
            UnsupportedFormatError: `cols` is not a multiple of the block size.
        """
        if cols % self.block_size:
            raise UnsupportedFormatError(
                f"{self.name} stores blocks of {self.block_size} weights: a row of {cols} is not a multiple of that; "
                "choose a format with smaller blocks (32: Q4_0 to Q8_0, 1: BF16, F16, F32)."
            )
        return cols // self.block_size * self.block_bytes

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix `[rows, cols]`; UnsupportedFormatError as for `row_bytes`."""
        return rows * self.row_bytes(cols)


FORMATS: Mapping[str, WeightFormat] = MappingProxyType({row["name"]: WeightFormat(**row) for row in _native.formats()})
"""Every format that can be read, by name."""

_BY_GGML_TYPE = MappingProxyType(
    {weight_format.ggml_type: weight_format for weight_format in FORMATS.values() if weight_format.in_gguf}
)


def get_format(name: str, named: Iterable[WeightFormat] | None = None) -> WeightFormat:
    """The format of this name, in any case ("q4_k" is "Q4_K").

    Args:
        name: of a format.
        named: those that the error names, of use where the name is asked for; all if None.

    Raises:
        UnsupportedFormatError: there is no such format; the message lists those there are.
    """
    found = FORMATS.get(name.upper())
    if found is None:
        names = ", ".join(fmt.name for fmt in (FORMATS.values() if named is None else named))
        raise UnsupportedFormatError(f"'{name}' is no weight format: expected one of {names}.")
    return found


def format_from_ggml(number: int) -> WeightFormat:
    """The format with this number in a GGUF file.

    Raises:
        UnsupportedFormatError: the number is unknown or its format cannot be read.
    """
    found = _BY_GGML_TYPE.get(number)
    if found is None:
        readable = ", ".join(f"{weight_format.name} ({number})" for number, weight_format in _BY_GGML_TYPE.items())
        raise UnsupportedFormatError(f"ggml type {number} cannot be read: expected one of {readable}.")
    return found


def format_from_safetensors_dtype(dtype: str) -> WeightFormat:
    """The format of tensors with this dtype in a safetensors header.

    Raises:
        UnsupportedFormatError: it is none of F32, F16 and BF16, whose names safetensors and ggml share.
    """
    found = FORMATS.get(dtype)
    if found is None or found.is_quantized:
        floats = ", ".join(name for name, weight_format in FORMATS.items() if not weight_format.is_quantized)
        raise UnsupportedFormatError(f"the safetensors dtype '{dtype}' cannot be read: expected one of {floats}.")
    return found
