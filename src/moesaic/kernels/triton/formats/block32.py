"""Formats of 32 weights whose nibbles are 16 columns apart (Q4_0 to Q5_1, INT4, UINT4), and of bytes (Q8_0)."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, byte_codes, byte_pairs, one_word, spread
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["GROUPED", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@triton.jit
def _nibbles(loaded, grid, magic, item, step) -> Any:
    return byte_codes(loaded[0], magic, 0, 15, 0, 0) + byte_codes(loaded[0], magic, 4, 15, 0, 0)


@triton.jit
def _nibbles_less_8(loaded, grid, magic, item, step) -> Any:
    return byte_codes(loaded[0], magic, 0, 15, 8, 0) + byte_codes(loaded[0], magic, 4, 15, 8, 0)


@triton.jit
def _nibble_pairs(loaded, item, step) -> Any:
    return byte_pairs(loaded[0], 0, 15) + byte_pairs(loaded[0] >> 4, 0, 15)


@triton.jit
def _load_five_bits(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * step), tl.load(words + 4 * 16)


@triton.jit
def _five_bits(loaded, step) -> Any:
    """Words of both planes: nibbles and their fifth bits, bit i of byte c for weight 4 i + c."""
    word = loaded[0]
    fifth = loaded[1] >> step
    return (word & 0x0F0F0F0F) | (fifth << 4 & 0x10101010), (word >> 4 & 0x0F0F0F0F) | (fifth & 0x10101010)


@triton.jit
def _q5_0(loaded, grid, magic, item, step) -> Any:
    low, high = _five_bits(loaded, step)
    return byte_codes(low, magic, 0, 31, 16, 0) + byte_codes(high, magic, 0, 31, 16, 0)


@triton.jit
def _q5_1(loaded, grid, magic, item, step) -> Any:
    low, high = _five_bits(loaded, step)
    return byte_codes(low, magic, 0, 31, 0, 0) + byte_codes(high, magic, 0, 31, 0, 0)


@triton.jit
def _five_bit_pairs(loaded, item, step) -> Any:
    low, high = _five_bits(loaded, step)
    return byte_pairs(low, 0, 31) + byte_pairs(high, 0, 31)


@triton.jit
def _q8_0(loaded, grid, magic, item, step) -> Any:
    return byte_codes(loaded[0], magic, 0, 255, 128, 128)


@triton.jit
def _q8_0_pairs(loaded, item, step) -> Any:
    return byte_pairs(loaded[0] ^ -0x7F7F7F80, 0, 255)


@triton.jit
def _load_last_half(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * (F.tile_units - 2)),)


@triton.jit
def _load_last_two_halves(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(halves + 8 * (F.tile_units - 4)), tl.load(halves + 8 * (F.tile_units - 2))


@triton.jit
def _floats(loaded, item, F: tl.constexpr) -> Any:
    count: tl.constexpr = F.num_scales + F.num_sums
    out = ()
    for i in tl.static_range(count):
        out = out + (loaded[i].to(tl.float32),)
    return out


@triton.jit
def _bfloat16(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[0].to(tl.bfloat16, bitcast=True).to(tl.float32),)


@triton.jit
def _load_half_and_byte(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return tl.load(halves + 8 * (F.tile_units - 3)), byte_at(bytes, F.tile_units - 1)


@triton.jit
def _half_and_zero(loaded, item, F: tl.constexpr) -> Any:
    d = loaded[0].to(tl.float32)
    return d, -d * spread(loaded[1]).to(tl.float32)


@triton.jit
def _bfloat16_and_zero(loaded, item, F: tl.constexpr) -> Any:
    d = loaded[0].to(tl.bfloat16, bitcast=True).to(tl.float32)
    return d, -d * spread(loaded[1]).to(tl.float32)


_NIBBLES: dict[str, Any] = {"planes": 2, "steps": 4, "pairs": _nibble_pairs, "pair_bits": (0, 0)}
_FIVE_BITS: dict[str, Any] = {"planes": 2, "steps": 4, "pairs": _five_bit_pairs, "pair_bits": (0, 0)}
_HALF, _TWO_HALVES = (_load_last_half, _floats), (_load_last_two_halves, _floats)
_BITS = (0, 8, 0, 8, 4, 12, 4, 12)
Q4_0 = DeviceFormat("Q4_0", one_word, _nibbles_less_8, *_HALF, tile_units=18, zero=8, **_NIBBLES)
Q4_1 = DeviceFormat("Q4_1", one_word, _nibbles, *_TWO_HALVES, tile_units=20, has_offset=True, bits=_BITS, **_NIBBLES)
Q5_0 = DeviceFormat("Q5_0", _load_five_bits, _q5_0, *_HALF, tile_units=22, zero=16, **_FIVE_BITS)
Q5_1 = DeviceFormat(
    "Q5_1", _load_five_bits, _q5_1, *_TWO_HALVES, tile_units=24, has_offset=True, bits=(0, 8) * 4, **_FIVE_BITS
)
Q8_0 = DeviceFormat(
    "Q8_0", one_word, _q8_0, *_HALF, tile_units=34, steps=8, pairs=_q8_0_pairs, pair_bits=(0,), zero=128
)


def _grouped(group: int, is_bfloat16: bool, has_zero: bool) -> DeviceFormat:
    """INT4 or UINT4: 4-bit weights, a scale and perhaps a zero point for each 32, 64 or 128."""
    name = f"{'UINT4' if has_zero else 'INT4'}_{group}_{'BF16' if is_bfloat16 else 'F16'}"
    if has_zero:
        codes, load, scales = _nibbles, _load_half_and_byte, _bfloat16_and_zero if is_bfloat16 else _half_and_zero
    else:
        codes, load, scales = _nibbles_less_8, _load_last_half, _bfloat16 if is_bfloat16 else _floats
    return DeviceFormat(
        name,
        one_word,
        codes,
        load,
        scales,
        has_offset=has_zero,
        items_per_tile=group // 32,
        tile_units=group // 2 + 2 + has_zero,
        bits=_BITS if has_zero else (),
        zero=0 if has_zero else 8,
        **_NIBBLES,
    )


GROUPED = tuple(
    _grouped(group, is_bfloat16, has_zero)
    for has_zero in (False, True)
    for is_bfloat16 in (False, True)
    for group in (32, 64, 128)
)
