"""Q4_K and Q5_K: words of 4 bits whose nibbles are 32 columns apart, scales and minima of 6 bits for 32 weights."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_codes
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["Q4_K", "Q5_K"]


@triton.jit
def _six_bits(bytes, halves, start: tl.constexpr, item) -> Any:
    """Scales and negated minima of the groups 2 item and 2 item + 1; the field of 12 bytes begins at `start`."""
    d = tl.load(halves + 8 * (start + 12)).to(tl.float32)
    minus_dmin = -tl.load(halves + 8 * (start + 14)).to(tl.float32)
    packed = bytes + 16 * start
    # Groups 0 to 3: six bits of bytes 0-3 and 4-7; 4 to 7: a nibble of bytes 8-11 under two bits of the former.
    group = item * 2 % 4
    is_late = item >= 2
    a = tl.load(packed + 16 * group).to(tl.int32)
    b = tl.load(packed + 16 * (group + 1)).to(tl.int32)
    e = tl.load(packed + 16 * (group + 4)).to(tl.int32)
    f = tl.load(packed + 16 * (group + 5)).to(tl.int32)
    g = tl.load(packed + 16 * (group + 8)).to(tl.int32)
    h = tl.load(packed + 16 * (group + 9)).to(tl.int32)
    scale0 = tl.where(is_late, (g & 15) | (a >> 2 & 48), a & 63)
    scale1 = tl.where(is_late, (h & 15) | (b >> 2 & 48), b & 63)
    minimum0 = tl.where(is_late, (g >> 4) | (e >> 2 & 48), e & 63)
    minimum1 = tl.where(is_late, (h >> 4) | (f >> 2 & 48), f & 63)
    return (
        d * scale0.to(tl.float32),
        d * scale1.to(tl.float32),
        minus_dmin * minimum0.to(tl.float32),
        minus_dmin * minimum1.to(tl.float32),
    )


@triton.jit
def _q4_k(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (8 * item + step))
    return byte_codes(word, magic, 0, 15, 0, 0) + byte_codes(word, magic, 4, 15, 0, 0)


@triton.jit
def _q4_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return _six_bits(bytes, halves, 128, item)


@triton.jit
def _q5_k(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (8 * item + step))
    fifth = tl.load(words + 16 * (32 + step)) >> (2 * item)
    low = (word & 0x0F0F0F0F) | (fifth << 4 & 0x10101010)
    high = (word >> 4 & 0x0F0F0F0F) | (fifth << 3 & 0x10101010)
    return byte_codes(low, magic, 0, 31, 0, 0) + byte_codes(high, magic, 0, 31, 0, 0)


@triton.jit
def _q5_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return _six_bits(bytes, halves, 160, item)


_K_NIBBLES: dict[str, Any] = {"planes": 2, "steps": 8, "num_scales": 2, "has_offset": True, "items_per_tile": 4}
Q4_K = DeviceFormat("Q4_K", _q4_k, _q4_k_scales, tile_units=144, **_K_NIBBLES)
Q5_K = DeviceFormat("Q5_K", _q5_k, _q5_k_scales, tile_units=176, **_K_NIBBLES)
