"""Formats of 32 weights whose nibbles are 16 columns apart (Q4_0 to Q5_1, INT4, UINT4), and of bytes (Q8_0)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_codes
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["GROUPED", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@triton.jit
def _nibbles(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (4 * item + step))
    return byte_codes(word, magic, 0, 15, 0, 0) + byte_codes(word, magic, 4, 15, 0, 0)


@triton.jit
def _nibbles_less_8(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (4 * item + step))
    return byte_codes(word, magic, 0, 15, 8, 0) + byte_codes(word, magic, 4, 15, 8, 0)


@triton.jit
def _five_bits(words, step) -> Any:
    """Words of both planes: nibbles and their fifth bits, bit i of byte c for weight 4 i + c."""
    word = tl.load(words + 16 * step)
    fifth = tl.load(words + 4 * 16) >> step
    return (word & 0x0F0F0F0F) | (fifth << 4 & 0x10101010), (word >> 4 & 0x0F0F0F0F) | (fifth & 0x10101010)


@triton.jit
def _q5_0(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    low, high = _five_bits(words, step)
    return byte_codes(low, magic, 0, 31, 16, 0) + byte_codes(high, magic, 0, 31, 16, 0)


@triton.jit
def _q5_1(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    low, high = _five_bits(words, step)
    return byte_codes(low, magic, 0, 31, 0, 0) + byte_codes(high, magic, 0, 31, 0, 0)


@triton.jit
def _q8_0(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    return byte_codes(tl.load(words + 16 * step), magic, 0, 255, 128, 128)


@triton.jit
def _last_half(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * (F.tile_units - 2)).to(tl.float32),)


@triton.jit
def _last_two_halves(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * (F.tile_units - 4)).to(tl.float32)
    return d, tl.load(halves + 8 * (F.tile_units - 2)).to(tl.float32)


@triton.jit
def _last_bfloat16(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * (F.tile_units - 2)).to(tl.bfloat16, bitcast=True).to(tl.float32),)


@triton.jit
def _half_and_zero(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * (F.tile_units - 3)).to(tl.float32)
    return d, -d * tl.load(bytes + 16 * (F.tile_units - 1)).to(tl.float32)


@triton.jit
def _bfloat16_and_zero(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * (F.tile_units - 3)).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return d, -d * tl.load(bytes + 16 * (F.tile_units - 1)).to(tl.float32)


_NIBBLES: dict[str, Any] = {"planes": 2, "steps": 4}
Q4_0 = DeviceFormat("Q4_0", _nibbles_less_8, _last_half, tile_units=18, **_NIBBLES)
Q4_1 = DeviceFormat("Q4_1", _nibbles, _last_two_halves, tile_units=20, has_offset=True, **_NIBBLES)
Q5_0 = DeviceFormat("Q5_0", _q5_0, _last_half, tile_units=22, **_NIBBLES)
Q5_1 = DeviceFormat("Q5_1", _q5_1, _last_two_halves, tile_units=24, has_offset=True, **_NIBBLES)
Q8_0 = DeviceFormat("Q8_0", _q8_0, _last_half, tile_units=34, steps=8)


def _grouped(group: int, is_bfloat16: bool, has_zero: bool) -> DeviceFormat:
    """INT4 or UINT4: 4-bit weights, a scale and perhaps a zero point for each 32, 64 or 128."""
    name = f"{'UINT4' if has_zero else 'INT4'}_{group}_{'BF16' if is_bfloat16 else 'F16'}"
    if has_zero:
        codes, scales = _nibbles, _bfloat16_and_zero if is_bfloat16 else _half_and_zero
    else:
        codes, scales = _nibbles_less_8, _last_bfloat16 if is_bfloat16 else _last_half
    return DeviceFormat(
        name,
        codes,
        scales,
        has_offset=has_zero,
        items_per_tile=group // 32,
        tile_units=group // 2 + 2 + has_zero,
        **_NIBBLES,
    )


GROUPED = tuple(
    _grouped(group, is_bfloat16, has_zero)
    for has_zero in (False, True)
    for is_bfloat16 in (False, True)
    for group in (32, 64, 128)
)
