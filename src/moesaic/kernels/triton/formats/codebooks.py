"""IQ1, IQ2 and IQ3: indices into a codebook, whose entries are 4 or 8 weights, under scales; signs apart (IQ2, IQ3)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, field, spread
from moesaic.kernels.triton.formats.description import DeviceFormat
from moesaic.kernels.triton.formats.grids import grid_maker
from moesaic.kernels.triton.formats.ternary import iq1_m_scale, load_iq1_m_scale

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
def _nibble(byte, item) -> Any:
    """The nibble of an item of bytes that have those of two."""
    return spread(byte >> (item % 2 * 4) & 0x0F0F0F0F).to(tl.float32)


@triton.jit
def _load_iq1_s(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * item), _half_bits(halves + 8 * 32 + 16 * item)


@triton.jit
def _iq1_s(loaded, grid, magic, item, step) -> Any:
    return _ternary(grid, magic, loaded[0] >> (8 * step) & 255 | (loaded[1] >> (3 * step) & 7) << 8)


@triton.jit
def _load_iq1_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return _half_bits(halves + 8 * 32 + 16 * item), tl.load(halves + 8 * 48)


@triton.jit
def _iq1_s_scales(loaded, item, F: tl.constexpr) -> Any:
    high, d = loaded
    scale = d.to(tl.float32) * ((high >> 11 & 14) + 1).to(tl.float32)
    return scale, tl.where(high < 0, scale * -0.125, scale * 0.125)


@triton.jit
def _load_iq1_m(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * (item // 2)), _half_bits(halves + 8 * 32 + 16 * (item // 2))


@triton.jit
def _iq1_m(loaded, grid, magic, item, step) -> Any:
    nth = item % 2 * 2 + step
    high = loaded[1] >> (4 * nth)
    delta = tl.where((high & 8) == 0, 0.125, -0.125)
    a, b, c, d, e, f, g, h = _ternary(grid, magic, loaded[0] >> (8 * nth) & 255 | (high & 7) << 8)
    return a + delta, b + delta, c + delta, d + delta, e + delta, f + delta, g + delta, h + delta


@triton.jit
def _load_iq1_m_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return load_iq1_m_scale(words + 4 * 48)


@triton.jit
def _iq1_m_scales(loaded, item, F: tl.constexpr) -> Any:
    return (iq1_m_scale(loaded, item),)


@triton.jit
def _load_iq2_xxs(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 32 * item), tl.load(words + 32 * item + 16)


@triton.jit
def _iq2_xxs(loaded, grid, magic, item, step) -> Any:
    return _eight(grid, magic, loaded[0] >> (8 * step) & 255, _with_parity(loaded[1] >> (7 * step) & 127))


@triton.jit
def _load_iq2_xxs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(words + 32 * item + 16), tl.load(halves + 8 * 64)


@triton.jit
def _iq2_xxs_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[1].to(tl.float32) * (0.25 * (loaded[0] >> 28 & 15).to(tl.float32) + 0.125),)


@triton.jit
def _load_iq2_xs(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * (item // 2)), tl.load(words + 4 * 32 + 16 * (item // 2))


@triton.jit
def _iq2_xs(loaded, grid, magic, item, step) -> Any:
    nth = item % 2 * 2 + step
    high = loaded[1] >> (8 * nth)
    return _eight(grid, magic, loaded[0] >> (8 * nth) & 255 | (high & 128) << 1, _with_parity(high & 127))


@triton.jit
def _load_iq2_xs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return byte_at(bytes, 64 + item // 2), tl.load(halves + 8 * 72)


@triton.jit
def _iq2_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[1].to(tl.float32) * (0.25 * _nibble(loaded[0], item) + 0.125),)


@triton.jit
def _load_iq2_s(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    at = words + 16 * (item // 2)
    return tl.load(at), tl.load(at + 4 * 32), byte_at(bytes, 64 + item // 2)


@triton.jit
def _iq2_s(loaded, grid, magic, item, step) -> Any:
    nth = item % 2 * 2 + step
    high = spread(loaded[2] >> (2 * nth) & 0x03030303)
    return _eight(grid, magic, loaded[0] >> (8 * nth) & 255 | high << 8, loaded[1] >> (8 * nth))


@triton.jit
def _load_iq2_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return byte_at(bytes, 72 + item // 2), tl.load(halves + 8 * 80)


@triton.jit
def _load_iq3_xxs(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 32 * item + 16 * (step // 4)), tl.load(words + 4 * 64 + 16 * item)


@triton.jit
def _iq3_xxs(loaded, grid, magic, item, step) -> Any:
    signs = _with_parity(loaded[1] >> (step // 2 * 7) & 127)
    return _four(grid, magic, loaded[0] >> (step % 4 * 8) & 255, signs >> (step % 2 * 4))


@triton.jit
def _load_iq3_xxs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(words + 4 * 64 + 16 * item), tl.load(halves + 8 * 96)


@triton.jit
def _iq3_xxs_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[1].to(tl.float32) * (0.5 * (loaded[0] >> 28 & 15).to(tl.float32) + 0.25),)


@triton.jit
def _load_iq3_s(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    low = tl.load(words + 32 * item + 16 * (step // 4))
    return low, tl.load(words + 4 * 64 + 16 * item), byte_at(bytes, 96 + item)


@triton.jit
def _iq3_s(loaded, grid, magic, item, step) -> Any:
    high = spread(loaded[2] >> step & 0x01010101)
    return _four(grid, magic, loaded[0] >> (step % 4 * 8) & 255 | high << 8, loaded[1] >> (4 * step))


@triton.jit
def _load_iq3_s_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return byte_at(bytes, 104 + item // 2), tl.load(halves + 8 * 108)


@triton.jit
def _iq3_s_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[1].to(tl.float32) * (2.0 * _nibble(loaded[0], item) + 1.0),)


def _codebook(
    name: str, load: Any, codes: Any, load_scales: Any, scales: Any, width: int, steps: int, tile_units: int,
    has_offset: bool = False,
) -> DeviceFormat:  # fmt: skip
    return DeviceFormat(
        name,
        load,
        codes,
        load_scales,
        scales,
        steps=steps,
        width=width,
        has_offset=has_offset,
        items_per_tile=256 // (steps * width),
        tile_units=tile_units,
        grid=grid_maker(name),
    )


IQ1_S = _codebook("IQ1_S", _load_iq1_s, _iq1_s, _load_iq1_s_scales, _iq1_s_scales, 8, 4, 50, has_offset=True)
IQ1_M = _codebook("IQ1_M", _load_iq1_m, _iq1_m, _load_iq1_m_scales, _iq1_m_scales, 8, 2, 56)
IQ2_XXS = _codebook("IQ2_XXS", _load_iq2_xxs, _iq2_xxs, _load_iq2_xxs_scales, _iq2_xxs_scales, 8, 4, 66)
IQ2_XS = _codebook("IQ2_XS", _load_iq2_xs, _iq2_xs, _load_iq2_xs_scales, _iq2_scales, 8, 2, 74)
IQ2_S = _codebook("IQ2_S", _load_iq2_s, _iq2_s, _load_iq2_s_scales, _iq2_scales, 8, 2, 82)
IQ3_XXS = _codebook("IQ3_XXS", _load_iq3_xxs, _iq3_xxs, _load_iq3_xxs_scales, _iq3_xxs_scales, 4, 8, 98)
IQ3_S = _codebook("IQ3_S", _load_iq3_s, _iq3_s, _load_iq3_s_scales, _iq3_s_scales, 4, 8, 110)
