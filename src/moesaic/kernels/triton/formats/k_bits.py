"""Q2_K, Q3_K, Q6_K and TQ2_0: words of 2 bits whose pairs are 32 columns apart, scales for 16 weights, or one for all.

An item is half of what 8 words hold: words 0-3 or 4-7, that is weights 0-15 or 16-31 of four groups of 32.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, byte_codes, byte_pairs, one_word, spread
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["Q2_K", "Q3_K", "Q6_K", "TQ2_0"]


@triton.jit
def _q2_k(loaded, grid, magic, item, step) -> Any:
    word = loaded[0]
    return (
        byte_codes(word, magic, 0, 3, 0, 0)
        + byte_codes(word, magic, 2, 3, 0, 0)
        + byte_codes(word, magic, 4, 3, 0, 0)
        + byte_codes(word, magic, 6, 3, 0, 0)
    )


@triton.jit
def _q2_k_pairs(loaded, item, step) -> Any:
    word = loaded[0]
    return byte_pairs(word, 0, 3) + byte_pairs(word, 2, 3) + byte_pairs(word, 4, 3) + byte_pairs(word, 6, 3)


@triton.jit
def _load_q2_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    first = 64 + item // 2 * 8 + item % 2
    return (
        byte_at(bytes, first),
        byte_at(bytes, first + 2),
        byte_at(bytes, first + 4),
        byte_at(bytes, first + 6),
        tl.load(halves + 8 * 80),
        tl.load(halves + 8 * 82),
    )


@triton.jit
def _q2_k_scales(loaded, item, F: tl.constexpr) -> Any:
    d = loaded[4].to(tl.float32)
    minus_dmin = -loaded[5].to(tl.float32)
    scales = ()
    offsets = ()
    for p in tl.static_range(4):
        scales = scales + (d * spread(loaded[p] & 0x0F0F0F0F).to(tl.float32),)
        offsets = offsets + (minus_dmin * spread(loaded[p] >> 4 & 0x0F0F0F0F).to(tl.float32),)
    return scales + offsets


@triton.jit
def _load_q3_k(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return tl.load(words + 16 * (4 * item + step)), tl.load(words + 4 * 64 + 16 * (item % 2 * 4 + step))


@triton.jit
def _three_bits(loaded, item) -> Any:
    word = loaded[0]
    third = loaded[1] >> (item // 2 * 4)
    return (
        (word & 0x03030303) | (third << 2 & 0x04040404),
        (word >> 2 & 0x03030303) | (third << 1 & 0x04040404),
        (word >> 4 & 0x03030303) | (third & 0x04040404),
        (word >> 6 & 0x03030303) | (third >> 1 & 0x04040404),
    )


@triton.jit
def _q3_k(loaded, grid, magic, item, step) -> Any:
    a, b, c, d = _three_bits(loaded, item)
    return (
        byte_codes(a, magic, 0, 7, 4, 0)
        + byte_codes(b, magic, 0, 7, 4, 0)
        + byte_codes(c, magic, 0, 7, 4, 0)
        + byte_codes(d, magic, 0, 7, 4, 0)
    )


@triton.jit
def _q3_k_pairs(loaded, item, step) -> Any:
    a, b, c, d = _three_bits(loaded, item)
    return byte_pairs(a, 0, 7) + byte_pairs(b, 0, 7) + byte_pairs(c, 0, 7) + byte_pairs(d, 0, 7)


@triton.jit
def _load_q3_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    half = item % 2
    return (
        byte_at(bytes, 96 + half),
        byte_at(bytes, 98 + half),
        byte_at(bytes, 100 + half),
        byte_at(bytes, 102 + half),
        byte_at(bytes, 104 + half),
        byte_at(bytes, 106 + half),
        tl.load(halves + 8 * 108),
    )


@triton.jit
def _q3_k_scales(loaded, item, F: tl.constexpr) -> Any:
    d = loaded[6].to(tl.float32)
    shift = item // 2 * 4
    scales = ()
    for p in tl.static_range(4):
        high = loaded[4 + p % 2] >> (shift + p // 2 * 2)
        bits = spread((loaded[p] >> shift & 0x0F0F0F0F) | (high << 4 & 0x30303030))
        scales = scales + (d * (bits - 32).to(tl.float32),)
    return scales


@triton.jit
def _load_q6_k(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    i = item % 2 * 4 + step
    low = words + 16 * (item // 2 * 16 + i)
    return tl.load(low), tl.load(low + 16 * 8), tl.load(words + 4 * 128 + 16 * (item // 2 * 8 + i))


@triton.jit
def _six_bits(loaded) -> Any:
    a, b, high = loaded
    return (
        (a & 0x0F0F0F0F) | (high << 4 & 0x30303030),
        (b & 0x0F0F0F0F) | (high << 2 & 0x30303030),
        (a >> 4 & 0x0F0F0F0F) | (high & 0x30303030),
        (b >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030),
    )


@triton.jit
def _q6_k(loaded, grid, magic, item, step) -> Any:
    a, b, c, d = _six_bits(loaded)
    return (
        byte_codes(a, magic, 0, 63, 32, 0)
        + byte_codes(b, magic, 0, 63, 32, 0)
        + byte_codes(c, magic, 0, 63, 32, 0)
        + byte_codes(d, magic, 0, 63, 32, 0)
    )


@triton.jit
def _q6_k_pairs(loaded, item, step) -> Any:
    a, b, c, d = _six_bits(loaded)
    return byte_pairs(a, 0, 63) + byte_pairs(b, 0, 63) + byte_pairs(c, 0, 63) + byte_pairs(d, 0, 63)


@triton.jit
def _load_q6_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    first = 192 + item // 2 * 8 + item % 2
    return (
        byte_at(bytes, first),
        byte_at(bytes, first + 2),
        byte_at(bytes, first + 4),
        byte_at(bytes, first + 6),
        tl.load(halves + 8 * 208),
    )


@triton.jit
def _q6_k_scales(loaded, item, F: tl.constexpr) -> Any:
    d = loaded[4].to(tl.float32)
    scales = ()
    for p in tl.static_range(4):
        scales = scales + (d * (spread(loaded[p] ^ -0x7F7F7F80) - 128).to(tl.float32),)
    return scales


@triton.jit
def _tq2_0(loaded, grid, magic, item, step) -> Any:
    word = loaded[0]
    return (
        byte_codes(word, magic, 0, 3, 1, 0)
        + byte_codes(word, magic, 2, 3, 1, 0)
        + byte_codes(word, magic, 4, 3, 1, 0)
        + byte_codes(word, magic, 6, 3, 1, 0)
    )


@triton.jit
def _tq2_0_pairs(loaded, item, step) -> Any:
    w = loaded[0]
    return byte_pairs(w, 0, 3) + byte_pairs(w >> 2, 0, 3) + byte_pairs(w >> 4, 0, 3) + byte_pairs(w >> 6, 0, 3)


@triton.jit
def _load_tq2_0_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 64),)


@triton.jit
def _tq2_0_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[0].to(tl.float32),)


_HALVES: dict[str, Any] = {"planes": 4, "steps": 4, "interleave": 2, "num_scales": 4, "items_per_tile": 4}
Q2_K = DeviceFormat(
    "Q2_K", one_word, _q2_k, _load_q2_k_scales, _q2_k_scales, tile_units=84, has_offset=True,
    bits=(0, 8, 0, 8, 2, 10, 2, 10, 4, 12, 4, 12, 6, 14, 6, 14), pairs=_q2_k_pairs, pair_bits=(0, 2, 4, 6), **_HALVES,
)  # fmt: skip
Q3_K = DeviceFormat(
    "Q3_K", _load_q3_k, _q3_k, _load_q3_k_scales, _q3_k_scales, tile_units=110, pairs=_q3_k_pairs, pair_bits=(0,) * 4,
    zero=4, **_HALVES,
)  # fmt: skip
Q6_K = DeviceFormat(
    "Q6_K", _load_q6_k, _q6_k, _load_q6_k_scales, _q6_k_scales, tile_units=210, pairs=_q6_k_pairs, pair_bits=(0,) * 4,
    zero=32, **_HALVES,
)  # fmt: skip
TQ2_0 = DeviceFormat(
    "TQ2_0", one_word, _tq2_0, _load_tq2_0_scales, _tq2_0_scales, planes=4, steps=8, items_per_tile=2, tile_units=66,
    pairs=_tq2_0_pairs, pair_bits=(0,) * 4, zero=1,
)  # fmt: skip
