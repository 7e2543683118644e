"""Q4_K and Q5_K: words of 4 bits whose nibbles are 32 columns apart, scales and minima of 6 bits for 32 weights."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, byte_codes, byte_pairs, one_word, spread
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["Q4_K", "Q5_K"]


@triton.jit
def _load_six_bits(bytes, halves, start: tl.constexpr, item) -> Any:
    """Of the field of 12 bytes that begins at `start`, those of the groups 2 item and 2 item + 1; d and dmin."""
    # Groups 0 to 3: six bits of bytes 0-3 and 4-7; 4 to 7: a nibble of bytes 8-11 under two bits of the former.
    group = start + item * 2 % 4
    return (
        byte_at(bytes, group),
        byte_at(bytes, group + 1),
        byte_at(bytes, group + 4),
        byte_at(bytes, group + 5),
        byte_at(bytes, group + 8),
        byte_at(bytes, group + 9),
        tl.load(halves + 8 * (start + 12)),
        tl.load(halves + 8 * (start + 14)),
    )


@triton.jit
def _late_or_early(is_late, low, late, early) -> Any:
    return spread(tl.where(is_late, (low & 0x0F0F0F0F) | (late >> 2 & 0x30303030), early & 0x3F3F3F3F)).to(tl.float32)


@triton.jit
def _six_bits(loaded, item, F: tl.constexpr) -> Any:
    """Scales and negated minima."""
    a, b, e, f, g, h, d, dmin = loaded
    is_late = item >= 2
    d = d.to(tl.float32)
    minus_dmin = -dmin.to(tl.float32)
    return (
        d * _late_or_early(is_late, g, a, a),
        d * _late_or_early(is_late, h, b, b),
        minus_dmin * _late_or_early(is_late, g >> 4, e, e),
        minus_dmin * _late_or_early(is_late, h >> 4, f, f),
    )


@triton.jit
def _q4_k(loaded, grid, magic, item, step) -> Any:
    return byte_codes(loaded[0], magic, 0, 15, 0, 0) + byte_codes(loaded[0], magic, 4, 15, 0, 0)


@triton.jit
def _q4_k_pairs(loaded, item, step) -> Any:
    return byte_pairs(loaded[0], 0, 15) + byte_pairs(loaded[0], 4, 15)


@triton.jit
def _load_q4_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return _load_six_bits(bytes, halves, 128, item)


@triton.jit
def _load_q5_k(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * (8 * item + step)), tl.load(words + 16 * (32 + step))


@triton.jit
def _five_bits(loaded, item) -> Any:
    word = loaded[0]
    fifth = loaded[1] >> (2 * item)
    return (word & 0x0F0F0F0F) | (fifth << 4 & 0x10101010), (word >> 4 & 0x0F0F0F0F) | (fifth << 3 & 0x10101010)


@triton.jit
def _q5_k(loaded, grid, magic, item, step) -> Any:
    low, high = _five_bits(loaded, item)
    return byte_codes(low, magic, 0, 31, 0, 0) + byte_codes(high, magic, 0, 31, 0, 0)


@triton.jit
def _q5_k_pairs(loaded, item, step) -> Any:
    low, high = _five_bits(loaded, item)
    return byte_pairs(low, 0, 31) + byte_pairs(high, 0, 31)


@triton.jit
def _load_q5_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return _load_six_bits(bytes, halves, 160, item)


_K_NIBBLES: dict[str, Any] = {"planes": 2, "steps": 8, "num_scales": 2, "has_offset": True, "items_per_tile": 4}
Q4_K = DeviceFormat(
    "Q4_K", one_word, _q4_k, _load_q4_k_scales, _six_bits, tile_units=144, bits=(0, 8, 0, 8, 4, 12, 4, 12),
    pairs=_q4_k_pairs, pair_bits=(0, 4), **_K_NIBBLES,
)  # fmt: skip
Q5_K = DeviceFormat(
    "Q5_K", _load_q5_k, _q5_k, _load_q5_k_scales, _six_bits, tile_units=176, bits=(0, 8) * 4,
    pairs=_q5_k_pairs, pair_bits=(0, 0), **_K_NIBBLES,
)  # fmt: skip
