"""TQ1_0, and the other forms of IQ1_S and IQ1_M: bytes of five digits to the base 3."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import field
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["IQ1_M_TERNARY", "IQ1_S_TERNARY", "TQ1_0", "iq1_m_scale"]


@triton.jit
def _digits(word, n, magic) -> Any:
    """Digit n of each byte of a word, less 1."""
    power = tl.where(n == 0, 1, tl.where(n == 1, 3, tl.where(n == 2, 9, tl.where(n == 3, 27, 81))))
    even = ((word & 0x00FF00FF) * power & 0x00FF00FF) * 3 >> 8
    odd = ((word >> 8 & 0x00FF00FF) * power & 0x00FF00FF) * 3 >> 8
    return (
        field(even, even, magic, 0, 3, 1, 0),
        field(odd, odd, magic, 0, 3, 1, 0),
        field(even, even >> 16, magic, 16, 3, 1, 0),
        field(odd, odd >> 16, magic, 16, 3, 1, 0),
    )


@triton.jit
def _tq1_0(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    # 8 words have a digit n each for weights 32 n on, 4 words for 160 + 16 n on, the last one for 240 + 4 n on.
    four = tl.where(step < 40, step % 8, tl.where(step < 60, 8 + step % 4, 12))
    n = tl.where(step < 40, step // 8, tl.where(step < 60, (step - 40) // 4, step - 60))
    return _digits(tl.load(words + 16 * four), n, magic)


@triton.jit
def _tq1_0_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 52).to(tl.float32),)


@triton.jit
def _fives(words, magic, quad) -> Any:
    """Weights 4 quad to 4 quad + 3: a word has five quads, one after the other."""
    return _digits(tl.load(words + 16 * (quad // 5)), quad % 5, magic)


@triton.jit
def _iq1_s_ternary(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    return _fives(words, magic, 8 * item + step)


@triton.jit
def _iq1_s_ternary_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    nibble = tl.load(words + 4 * 52) >> (4 * item)
    scale = tl.load(halves + 8 * 56).to(tl.float32) * (nibble & 14 | 1).to(tl.float32)
    return scale, tl.where((nibble & 1) == 0, scale * 0.125, scale * -0.125)


@triton.jit
def _iq1_m_ternary(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    eight = 2 * item + step // 2
    negative = tl.load(bytes + 16 * (52 + eight // 8)).to(tl.int32) >> (eight % 8) & 1
    delta = tl.where(negative == 0, 0.125, -0.125)
    a, b, c, d = _fives(words, magic, 4 * item + step)
    return a + delta, b + delta, c + delta, d + delta


@triton.jit
def iq1_m_scale(words, item) -> Any:
    """The scale of 16 weights, from IQ1_M's last 8 bytes: four times 3 bits, and 4 of d, in each half of two words."""
    a, b = tl.load(words), tl.load(words + 16)
    bits = (a >> 12 & 0x000F) | (a >> 24 & 0x00F0) | (b >> 4 & 0x0F00) | (b >> 16 & 0xF000)
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.where(item < 8, a, b) >> (item // 4 % 2 * 16 + item % 4 * 3) & 7
    return d * (2 * scale + 1).to(tl.float32)


@triton.jit
def _iq1_m_ternary_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (iq1_m_scale(words + 4 * 56, item),)


TQ1_0 = DeviceFormat("TQ1_0", _tq1_0, _tq1_0_scales, steps=64, tile_units=54)
IQ1_S_TERNARY = DeviceFormat(
    "IQ1_S_TERNARY", _iq1_s_ternary, _iq1_s_ternary_scales, has_offset=True, items_per_tile=8, tile_units=58
)
IQ1_M_TERNARY = DeviceFormat(
    "IQ1_M_TERNARY", _iq1_m_ternary, _iq1_m_ternary_scales, steps=4, items_per_tile=16, tile_units=64
)
