"""IQ1, IQ2 and IQ3: indices into a codebook, whose entries are 4 or 8 weights, under scales; signs apart (IQ2, IQ3)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import field
from moesaic.kernels.triton.formats.description import DeviceFormat
from moesaic.kernels.triton.formats.grids import grid_maker
from moesaic.kernels.triton.formats.ternary import iq1_m_scale

__all__ = ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS"]


@triton.jit
def _with_parity(code) -> Any:
    """8 signs from 7 bits: the number of minus signs is even."""
    odd = code ^ (code >> 4)
    odd = odd ^ (odd >> 2)
    return code | ((odd ^ (odd >> 1)) & 1) << 7


@triton.jit
def _signed_byte(word, magic, signs, byte: tl.constexpr, sign: tl.constexpr) -> Any:
    """A byte of words as float, negative where a bit of `signs` is set."""
    value = field(word, word >> 16, magic, 8 * byte, 127, 0, 0).to(tl.int32, bitcast=True)
    return (value ^ (signs << (31 - sign) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _four(grid, magic, index, signs) -> Any:
    """An entry of a codebook of 4 bytes."""
    word = tl.load(grid + index)
    return (
        _signed_byte(word, magic, signs, 0, 0),
        _signed_byte(word, magic, signs, 1, 1),
        _signed_byte(word, magic, signs, 2, 2),
        _signed_byte(word, magic, signs, 3, 3),
    )


@triton.jit
def _eight(grid, magic, index, signs) -> Any:
    """An entry of a codebook of 8 bytes."""
    return _four(grid, magic, 2 * index, signs) + _four(grid, magic, 2 * index + 1, signs >> 4)


@triton.jit
def _ternary(grid, magic, index) -> Any:
    """An entry of IQ1's codebook: eight times 2 bits, which are one of -1, 0, 1 plus 1."""
    word = tl.load(grid + index)
    return (
        field(word, word, magic, 0, 3, 1, 0), field(word, word, magic, 2, 3, 1, 0),
        field(word, word, magic, 4, 3, 1, 0), field(word, word, magic, 6, 3, 1, 0),
        field(word, word, magic, 8, 3, 1, 0), field(word, word, magic, 10, 3, 1, 0),
        field(word, word, magic, 12, 3, 1, 0), field(word, word, magic, 14, 3, 1, 0),
    )  # fmt: skip


@triton.jit
def _half_bits(halves) -> Any:
    return tl.load(halves).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _nibble(bytes, start: tl.constexpr, item) -> Any:
    """Nibble `item` of a field of bytes."""
    return (tl.load(bytes + 16 * (start + item // 2)).to(tl.int32) >> (item % 2 * 4) & 15).to(tl.float32)


@triton.jit
def _iq1_s(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    low = tl.load(words + 16 * item) >> (8 * step) & 255
    high = _half_bits(halves + 8 * 32 + 16 * item) >> (3 * step) & 7
    return _ternary(grid, magic, low | (high << 8))


@triton.jit
def _iq1_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    high = _half_bits(halves + 8 * 32 + 16 * item)
    d = tl.load(halves + 8 * 48).to(tl.float32)
    scale = d * ((high >> 11 & 14) + 1).to(tl.float32)
    return scale, tl.where(high < 0, scale * -0.125, scale * 0.125)


@triton.jit
def _iq1_m(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    nth = item % 2 * 2 + step
    low = tl.load(words + 16 * (item // 2)) >> (8 * nth) & 255
    high = _half_bits(halves + 8 * 32 + 16 * (item // 2)) >> (4 * nth)
    delta = tl.where((high & 8) == 0, 0.125, -0.125)
    a, b, c, d, e, f, g, h = _ternary(grid, magic, low | (high & 7) << 8)
    return a + delta, b + delta, c + delta, d + delta, e + delta, f + delta, g + delta, h + delta


@triton.jit
def _iq1_m_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (iq1_m_scale(words + 4 * 48, item),)


@triton.jit
def _iq2_xxs(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    index = tl.load(words + 32 * item) >> (8 * step) & 255
    return _eight(grid, magic, index, _with_parity(tl.load(words + 32 * item + 16) >> (7 * step) & 127))


@triton.jit
def _iq2_xxs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    scale = (tl.load(words + 32 * item + 16) >> 28 & 15).to(tl.float32)
    return (tl.load(halves + 8 * 64).to(tl.float32) * (0.25 * scale + 0.125),)


@triton.jit
def _iq2_xs(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    nth = item % 2 * 2 + step
    low = tl.load(words + 16 * (item // 2)) >> (8 * nth) & 255
    high = tl.load(words + 4 * 32 + 16 * (item // 2)) >> (8 * nth)
    return _eight(grid, magic, low | (high & 128) << 1, _with_parity(high & 127))


@triton.jit
def _iq2_xs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 72).to(tl.float32) * (0.25 * _nibble(bytes, 64, item) + 0.125),)


@triton.jit
def _iq2_s(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    nth = item % 2 * 2 + step
    low = tl.load(words + 16 * (item // 2)) >> (8 * nth) & 255
    signs = tl.load(words + 4 * 32 + 16 * (item // 2)) >> (8 * nth)
    high = tl.load(bytes + 16 * (64 + item // 2)).to(tl.int32) >> (2 * nth) & 3
    return _eight(grid, magic, low | (high << 8), signs)


@triton.jit
def _iq2_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 80).to(tl.float32) * (0.25 * _nibble(bytes, 72, item) + 0.125),)


@triton.jit
def _iq3_xxs(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    index = tl.load(words + 32 * item + 16 * (step // 4)) >> (step % 4 * 8) & 255
    signs = _with_parity(tl.load(words + 4 * 64 + 16 * item) >> (step // 2 * 7) & 127)
    return _four(grid, magic, index, signs >> (step % 2 * 4))


@triton.jit
def _iq3_xxs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    scale = (tl.load(words + 4 * 64 + 16 * item) >> 28 & 15).to(tl.float32)
    return (tl.load(halves + 8 * 96).to(tl.float32) * (0.5 * scale + 0.25),)


@triton.jit
def _iq3_s(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    low = tl.load(words + 32 * item + 16 * (step // 4)) >> (step % 4 * 8) & 255
    high = tl.load(bytes + 16 * (96 + item)).to(tl.int32) >> step & 1
    signs = tl.load(words + 4 * 64 + 16 * item) >> (4 * step)
    return _four(grid, magic, low | (high << 8), signs)


@triton.jit
def _iq3_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 108).to(tl.float32) * (2.0 * _nibble(bytes, 104, item) + 1.0),)


def _codebook(
    name: str, codes: Any, scales: Any, width: int, steps: int, tile_units: int, has_offset: bool = False
) -> DeviceFormat:
    return DeviceFormat(
        name,
        codes,
        scales,
        steps=steps,
        width=width,
        has_offset=has_offset,
        items_per_tile=256 // (steps * width),
        tile_units=tile_units,
        grid=grid_maker(name),
    )


IQ1_S = _codebook("IQ1_S", _iq1_s, _iq1_s_scales, 8, 4, 50, has_offset=True)
IQ1_M = _codebook("IQ1_M", _iq1_m, _iq1_m_scales, 8, 2, 56)
IQ2_XXS = _codebook("IQ2_XXS", _iq2_xxs, _iq2_xxs_scales, 8, 4, 66)
IQ2_XS = _codebook("IQ2_XS", _iq2_xs, _iq2_xs_scales, 8, 2, 74)
IQ2_S = _codebook("IQ2_S", _iq2_s, _iq2_s_scales, 8, 2, 82)
IQ3_XXS = _codebook("IQ3_XXS", _iq3_xxs, _iq3_xxs_scales, 4, 8, 98)
IQ3_S = _codebook("IQ3_S", _iq3_s, _iq3_s_scales, 4, 8, 110)
