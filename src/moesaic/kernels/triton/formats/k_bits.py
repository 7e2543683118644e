"""Q2_K, Q3_K, Q6_K and TQ2_0: words of 2 bits whose pairs are 32 columns apart, scales for 16 weights, or one for all.

An item is half of what 8 words hold: words 0-3 or 4-7, that is weights 0-15 or 16-31 of four groups of 32.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_codes
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["Q2_K", "Q3_K", "Q6_K", "TQ2_0"]


@triton.jit
def _q2_k(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (4 * item + step))
    return (
        byte_codes(word, magic, 0, 3, 0, 0)
        + byte_codes(word, magic, 2, 3, 0, 0)
        + byte_codes(word, magic, 4, 3, 0, 0)
        + byte_codes(word, magic, 6, 3, 0, 0)
    )


@triton.jit
def _q2_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * 80).to(tl.float32)
    minus_dmin = -tl.load(halves + 8 * 82).to(tl.float32)
    packed = bytes + 16 * (64 + item // 2 * 8 + item % 2)
    scales = ()
    offsets = ()
    for p in tl.static_range(4):
        both = tl.load(packed + 32 * p).to(tl.int32)
        scales = scales + (d * (both & 15).to(tl.float32),)
        offsets = offsets + (minus_dmin * (both >> 4).to(tl.float32),)
    return scales + offsets


@triton.jit
def _q3_k(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (4 * item + step))
    third = tl.load(words + 4 * 64 + 16 * (item % 2 * 4 + step)) >> (item // 2 * 4)
    return (
        byte_codes((word & 0x03030303) | (third << 2 & 0x04040404), magic, 0, 7, 4, 0)
        + byte_codes((word >> 2 & 0x03030303) | (third << 1 & 0x04040404), magic, 0, 7, 4, 0)
        + byte_codes((word >> 4 & 0x03030303) | (third & 0x04040404), magic, 0, 7, 4, 0)
        + byte_codes((word >> 6 & 0x03030303) | (third >> 1 & 0x04040404), magic, 0, 7, 4, 0)
    )


@triton.jit
def _q3_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * 108).to(tl.float32)
    half, shift = item % 2, item // 2 * 4
    packed = bytes + 16 * (96 + half)
    scales = ()
    for p in tl.static_range(4):
        low = tl.load(packed + 32 * p).to(tl.int32) >> shift & 15
        high = tl.load(packed + 16 * (8 + p % 2 * 2)).to(tl.int32) >> (shift + p // 2 * 2) & 3
        scales = scales + (d * ((low | (high << 4)) - 32).to(tl.float32),)
    return scales


@triton.jit
def _q6_k(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    i = item % 2 * 4 + step
    a = tl.load(words + 16 * (item // 2 * 16 + i))
    b = tl.load(words + 16 * (item // 2 * 16 + 8 + i))
    high = tl.load(words + 4 * 128 + 16 * (item // 2 * 8 + i))
    return (
        byte_codes((a & 0x0F0F0F0F) | (high << 4 & 0x30303030), magic, 0, 63, 32, 0)
        + byte_codes((b & 0x0F0F0F0F) | (high << 2 & 0x30303030), magic, 0, 63, 32, 0)
        + byte_codes((a >> 4 & 0x0F0F0F0F) | (high & 0x30303030), magic, 0, 63, 32, 0)
        + byte_codes((b >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030), magic, 0, 63, 32, 0)
    )


@triton.jit
def _q6_k_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    d = tl.load(halves + 8 * 208).to(tl.float32)
    packed = bytes + 16 * (192 + item // 2 * 8 + item % 2)
    scales = ()
    for p in tl.static_range(4):
        scales = scales + (d * tl.load(packed + 32 * p).to(tl.int8, bitcast=True).to(tl.float32),)
    return scales


@triton.jit
def _tq2_0(words, halves, bytes, grid, magic, item, cols, step) -> Any:
    word = tl.load(words + 16 * (8 * item + step))
    return (
        byte_codes(word, magic, 0, 3, 1, 0)
        + byte_codes(word, magic, 2, 3, 1, 0)
        + byte_codes(word, magic, 4, 3, 1, 0)
        + byte_codes(word, magic, 6, 3, 1, 0)
    )


@triton.jit
def _tq2_0_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 64).to(tl.float32),)


_HALVES: dict[str, Any] = {"planes": 4, "steps": 4, "interleave": 2, "num_scales": 4, "items_per_tile": 4}
Q2_K = DeviceFormat("Q2_K", _q2_k, _q2_k_scales, tile_units=84, has_offset=True, **_HALVES)
Q3_K = DeviceFormat("Q3_K", _q3_k, _q3_k_scales, tile_units=110, **_HALVES)
Q6_K = DeviceFormat("Q6_K", _q6_k, _q6_k_scales, tile_units=210, **_HALVES)
TQ2_0 = DeviceFormat("TQ2_0", _tq2_0, _tq2_0_scales, planes=4, steps=8, items_per_tile=2, tile_units=66)
