"""TQ1_0, and the other forms of IQ1_S and IQ1_M: bytes of five digits to the base 3."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, field, spread
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
def _load_tq1_0(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    # 8 words have a digit n each for weights 32 n on, 4 words for 160 + 16 n on, the last one for 240 + 4 n on.
    return (tl.load(words + 16 * tl.where(step < 40, step % 8, tl.where(step < 60, 8 + step % 4, 12))),)


@triton.jit
def _tq1_0(loaded, grid, magic, item, step) -> Any:
    n = tl.where(step < 40, step // 8, tl.where(step < 60, (step - 40) // 4, step - 60))
    return _digits(loaded[0], n, magic)


@triton.jit
def _load_tq1_0_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 52),)


@triton.jit
def _tq1_0_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[0].to(tl.float32),)


@triton.jit
def _load_fives(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    """The word that has weights 4 (steps * item + step) and three more: five quads, one after the other, are a word."""
    return (tl.load(words + 16 * ((F.steps * item + step) // 5)),)


@triton.jit
def _iq1_s_ternary(loaded, grid, magic, item, step) -> Any:
    return _digits(loaded[0], (8 * item + step) % 5, magic)


@triton.jit
def _load_iq1_s_ternary_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(words + 4 * 52), tl.load(halves + 8 * 56)


@triton.jit
def _iq1_s_ternary_scales(loaded, item, F: tl.constexpr) -> Any:
    nibble = loaded[0] >> (4 * item)
    scale = loaded[1].to(tl.float32) * (nibble & 14 | 1).to(tl.float32)
    return scale, tl.where((nibble & 1) == 0, scale * 0.125, scale * -0.125)


@triton.jit
def _iq1_s_block(loaded, grid, magic, item, step) -> Any:
    """Digit step % 5 of each byte of a word, two of them times 2^8 and two times 2^23.

    Two bytes have a part of an integer each, as fractions; multiplied by three, what is above the point is a digit. The
    upper ones' bits are an exponent's lowest and a fraction's highest, where 0, 1 and 2 are so, too.
    """
    word = loaded[0]
    after = word >> 8
    even = (word & 0xFF) | (word >> 1 & 0x7F8000)
    odd = (after & 0xFF) | (after >> 1 & 0x7F8000)
    before: tl.constexpr = step % 5
    for _ in tl.static_range(before):
        even = even * 3 & 0x7F80FF
        odd = odd * 3 & 0x7F80FF
    even = even * 3
    odd = odd * 3
    return (
        (even & 0x300).to(tl.float32, bitcast=True),
        (odd & 0x300).to(tl.float32, bitcast=True),
        (even & 0x1800000).to(tl.float32, bitcast=True),
        (odd & 0x1800000).to(tl.float32, bitcast=True),
    )


@triton.jit
def _iq1_s_block_scales(loaded, item, F: tl.constexpr) -> Any:
    """Of digits that count from 0: weights are scale * (digit - 1) and an eighth of it up or down."""
    d = loaded[1].to(tl.float32)
    scales = ()
    offsets = ()
    for group in tl.static_range(8):
        nibble = loaded[0] >> (4 * group)
        scale = d * (nibble & 14 | 1).to(tl.float32)
        scales = scales + (scale,)
        offsets = offsets + (scale * tl.where((nibble & 1) == 0, -0.875, -1.125),)
    return scales + offsets


@triton.jit
def _load_iq1_m_ternary(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * ((4 * item + step) // 5)), byte_at(bytes, 52 + item // 4)


@triton.jit
def _iq1_m_ternary(loaded, grid, magic, item, step) -> Any:
    eight = 2 * item + step // 2
    negative = spread(loaded[1] >> (eight % 8) & 0x01010101)
    delta = tl.where(negative == 0, 0.125, -0.125)
    a, b, c, d = _digits(loaded[0], (4 * item + step) % 5, magic)
    return a + delta, b + delta, c + delta, d + delta


@triton.jit
def load_iq1_m_scale(words) -> Any:
    """IQ1_M's last 8 bytes."""
    return tl.load(words), tl.load(words + 16)


@triton.jit
def iq1_m_scale(loaded, item) -> Any:
    """The scale of 16 weights, from IQ1_M's last 8 bytes: four times 3 bits, and 4 of d, in each half of two words."""
    a, b = loaded
    bits = (a >> 12 & 0x000F) | (a >> 24 & 0x00F0) | (b >> 4 & 0x0F00) | (b >> 16 & 0xF000)
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.where(item < 8, a, b) >> (item // 4 % 2 * 16 + item % 4 * 3) & 7
    return d * (2 * scale + 1).to(tl.float32)


@triton.jit
def _load_iq1_m_ternary_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return load_iq1_m_scale(words + 4 * 56)


@triton.jit
def _iq1_m_ternary_scales(loaded, item, F: tl.constexpr) -> Any:
    return (iq1_m_scale(loaded, item),)


TQ1_0 = DeviceFormat("TQ1_0", _load_tq1_0, _tq1_0, _load_tq1_0_scales, _tq1_0_scales, steps=64, tile_units=54)
_IQ1_S_BLOCK = DeviceFormat(
    "IQ1_S_TERNARY_BLOCK", _load_fives, _iq1_s_block, _load_iq1_s_ternary_scales, _iq1_s_block_scales, steps=64,
    num_scales=8, has_offset=True, tile_units=58, bits=(8, 8, 23, 23),
)  # fmt: skip
IQ1_S_TERNARY = DeviceFormat(
    "IQ1_S_TERNARY", _load_fives, _iq1_s_ternary, _load_iq1_s_ternary_scales, _iq1_s_ternary_scales, has_offset=True,
    items_per_tile=8, tile_units=58, few=_IQ1_S_BLOCK,
)  # fmt: skip
IQ1_M_TERNARY = DeviceFormat(
    "IQ1_M_TERNARY", _load_iq1_m_ternary, _iq1_m_ternary, _load_iq1_m_ternary_scales, _iq1_m_ternary_scales, steps=4,
    items_per_tile=16, tile_units=64,
)  # fmt: skip
