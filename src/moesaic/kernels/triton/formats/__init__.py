"""The formats that the kernels on a GPU can read: one row each. Adding one is a function in a file here and a row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moesaic.errors import UnsupportedFormatError
from moesaic.kernels.triton.formats.description import DeviceFormat
from moesaic.kernels.triton.formats.floats import BF16, BF16_ODD, F16, F32
from moesaic.kernels.triton.formats.k_nibbles import Q4_K, Q5_K
from moesaic.quant import WeightFormat

__all__ = ["DeviceFormat", "device_format", "supported_formats"]

_FORMATS: Mapping[str, DeviceFormat] = MappingProxyType(
    {
        "F32": F32,
        "F16": F16,
        "BF16": BF16,
        "Q4_K": Q4_K,
        "Q5_K": Q5_K,
    }
)


def supported_formats() -> tuple[str, ...]:
    """Names of the formats whose products a GPU can compute."""
    return tuple(_FORMATS)


def device_format(fmt: WeightFormat, cols: int) -> DeviceFormat:
    """How matrices of a format and so many columns are read.

    Raises:
        UnsupportedFormatError: no kernel reads them on a GPU; the message lists the formats there are.
    """
    found = _FORMATS.get(fmt.name)
    if found is None:
        raise UnsupportedFormatError(
            f"{fmt.name} has no kernels on a GPU: expected one of {', '.join(_FORMATS)}. Leave such weights on the CPU."
        )
    fmt.row_bytes(cols)
    return BF16_ODD if found is BF16 and cols % 2 else found
