"""The formats that the kernels on a GPU can read: one row each. Adding one is a function in a file here and a row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moesaic.errors import UnsupportedFormatError
from moesaic.kernels.triton.formats import block32, codebooks, floats, k_bits, k_nibbles, levels, small_floats, ternary
from moesaic.kernels.triton.formats.description import DeviceFormat
from moesaic.quant import WeightFormat

__all__ = ["DeviceFormat", "device_format", "supported_formats"]

_ROWS = (
    floats.F32,
    floats.F16,
    floats.BF16,
    block32.Q4_0,
    block32.Q4_1,
    block32.Q5_0,
    block32.Q5_1,
    block32.Q8_0,
    k_bits.Q2_K,
    k_bits.Q3_K,
    k_nibbles.Q4_K,
    k_nibbles.Q5_K,
    k_bits.Q6_K,
    k_bits.TQ2_0,
    levels.IQ4_NL,
    levels.IQ4_XS,
    ternary.TQ1_0,
    ternary.IQ1_S_TERNARY,
    ternary.IQ1_M_TERNARY,
    codebooks.IQ1_S,
    codebooks.IQ1_M,
    codebooks.IQ2_XXS,
    codebooks.IQ2_XS,
    codebooks.IQ2_S,
    codebooks.IQ3_XXS,
    codebooks.IQ3_S,
    small_floats.FP8,
    small_floats.FP8_32,
    small_floats.MXFP4,
    small_floats.NVFP4,
    *block32.GROUPED,
)
_FORMATS: Mapping[str, DeviceFormat] = MappingProxyType({form.name: form for form in _ROWS})


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
    return floats.BF16_ODD if found is floats.BF16 and cols % 2 else found
