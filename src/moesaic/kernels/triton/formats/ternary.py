"""TQ1_0, and the other forms of IQ1_S and IQ1_M: bytes of five ternary digits.

Those of TQ1_0 are fractions to the base 3; those of the other forms are described in `csrc/formats/ternary.h`.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, byte_codes, field, spread
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
def _pair(x) -> Any:
    """The two codes of numbers 0 to 7 in each byte, the first in the lowest bits."""
    return x + (x * 11 >> 5 & 0x03030303) + 0x05050505


@triton.jit
def _four_codes(word) -> Any:
    """Codes 0 to 3 of each byte of a word, two bits each."""
    codes = _pair(word & 0x07070707) | _pair((word ^ word >> 3) & 0x07070707) << 4
    has_no_h = ~(word >> 6 | word >> 7) & 0x01010101
    has_m = (word >> 3 | word >> 4) & 0x01010101
    is_above = has_m & word >> 5  # m is 5, 6, 7: the second pair is 8, else the first
    return codes | (has_no_h & ~is_above) * 0x0F | (has_no_h & ~(has_m & ~(word >> 5))) * 0xF0


@triton.jit
def _fifth_codes(word) -> Any:
    """Code 4 of each byte of a word, in its lowest bits."""
    h, m = word >> 6 & 0x03030303, word >> 3 & 0x03030303
    has_no_h = ~(h | h >> 1) & 0x01010101
    has_no_m = ~(m | m >> 1) & 0x01010101
    of_eights = 0x01010101 + (word >> 5 & 0x01010101) + (word >> 5 & word >> 2 & 0x01010101)
    return h | (has_no_h * 3 & (m | (has_no_m * 3 & of_eights)))


@triton.jit
def _place(group, quad) -> Any:
    """The word that has a quad of a group, and whether as code 4."""
    first = tl.where(group < 4, 0, 7)
    is_fifth = quad >= tl.where(group < 4, 7, 6)
    last = tl.where(quad == 7, tl.where(group < 7, group, 11), group + 3)
    return tl.where(is_fifth, last, first + quad), is_fifth


@triton.jit
def _load_quad(words, group, quad) -> Any:
    word, _ = _place(group, quad)
    return tl.load(words + 16 * word)


@triton.jit
def _quad_codes(word, magic, group, quad) -> Any:
    """The weights of a quad."""
    _, is_fifth = _place(group, quad)
    codes = tl.where(is_fifth, _fifth_codes(word), _four_codes(word) >> 2 * (group % 4))
    return byte_codes(codes, magic, 0, 3, 2, 0)


@triton.jit
def _load_iq1_s_ternary(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return (_load_quad(words, item, step),)


@triton.jit
def _iq1_s_ternary(loaded, grid, magic, item, step) -> Any:
    return _quad_codes(loaded[0], magic, item, step)


@triton.jit
def _load_iq1_s_ternary_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(words + 4 * 52), tl.load(halves + 8 * 56)


@triton.jit
def _iq1_s_ternary_scales(loaded, item, F: tl.constexpr) -> Any:
    nibble = loaded[0] >> (4 * item)
    scale = loaded[1].to(tl.float32) * (nibble & 14 | 1).to(tl.float32)
    return scale, tl.where((nibble & 1) == 0, scale * 0.125, scale * -0.125)


@triton.jit
def _load_iq1_s_half(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    """The words that have quad `step` of groups 0 to 3 or 4 to 7, for the last two steps one for each group."""
    if step < 6:
        return (tl.load(words + 16 * (7 * item + step)),)
    else:
        loaded = ()
        for group in tl.static_range(4):
            if step == 6:
                word = 6 + item * (1 + group)
            else:
                word = group + item * (4 if group < 3 else 8)
            loaded = loaded + (tl.load(words + 16 * word),)
        return loaded


@triton.jit
def _iq1_s_half(loaded, grid, magic, item, step) -> Any:
    """Quad `step` of four groups, whose codes are 4^n and 2^8 4^n as large."""
    if step < 7:
        codes = _four_codes(loaded[0])
    out = ()
    for group in tl.static_range(4):
        if step >= 6:
            fifth = _fifth_codes(loaded[group]) << 2 * group
        if step == 6:
            quad = tl.where(item == 0, codes, fifth)
        elif step == 7:
            quad = fifth
        else:
            quad = codes
        out = out + byte_codes(quad, None, 2 * group, 3, 0, 0)
    return out


@triton.jit
def _iq1_s_half_scales(loaded, item, F: tl.constexpr) -> Any:
    """Of codes: weights are scale * (code - 2) and an eighth of it up or down."""
    d = loaded[1].to(tl.float32)
    scales = ()
    offsets = ()
    for group in tl.static_range(4):
        nibble = loaded[0] >> (16 * item + 4 * group)
        scale = d * (nibble & 14 | 1).to(tl.float32)
        scales = scales + (scale,)
        offsets = offsets + (scale * tl.where((nibble & 1) == 0, -1.875, -2.125),)
    return scales + offsets


@triton.jit
def _load_iq1_m_ternary(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return _load_quad(words, item // 2, item % 2 * 4 + step), byte_at(bytes, 52 + item // 4)


@triton.jit
def _iq1_m_ternary(loaded, grid, magic, item, step) -> Any:
    eight = 2 * item + step // 2
    negative = spread(loaded[1] >> (eight % 8) & 0x01010101)
    delta = tl.where(negative == 0, 0.125, -0.125)
    a, b, c, d = _quad_codes(loaded[0], magic, item // 2, item % 2 * 4 + step)
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
_IQ1_S_HALF = DeviceFormat(
    "IQ1_S_TERNARY_HALF", _load_iq1_s_half, _iq1_s_half, _load_iq1_s_ternary_scales, _iq1_s_half_scales, planes=4,
    num_scales=4, has_offset=True, items_per_tile=2, tile_units=58,
    bits=(0, 8, 0, 8, 2, 10, 2, 10, 4, 12, 4, 12, 6, 14, 6, 14),
)  # fmt: skip
IQ1_S_TERNARY = DeviceFormat(
    "IQ1_S_TERNARY", _load_iq1_s_ternary, _iq1_s_ternary, _load_iq1_s_ternary_scales, _iq1_s_ternary_scales,
    has_offset=True, items_per_tile=8, tile_units=58, few=_IQ1_S_HALF,
)  # fmt: skip
IQ1_M_TERNARY = DeviceFormat(
    "IQ1_M_TERNARY", _load_iq1_m_ternary, _iq1_m_ternary, _load_iq1_m_ternary_scales, _iq1_m_ternary_scales, steps=4,
    items_per_tile=16, tile_units=64,
)  # fmt: skip
