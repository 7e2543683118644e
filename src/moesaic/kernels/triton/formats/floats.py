"""F32, F16 and BF16: panels [k][16 rows], or of pairs of k, [k / 2][16 rows][2], in BF16."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["BF16", "BF16_ODD", "F16", "F32"]


@triton.jit
def _load_f32(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return (tl.load(words + 16 * tl.minimum(item * 16 + step, cols - 1)),)


@triton.jit
def _f32(loaded, grid, magic, item, step) -> Any:
    return (loaded[0].to(tl.float32, bitcast=True),)


@triton.jit
def _load_f16(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return (tl.load(halves + 16 * tl.minimum(item * 16 + step, cols - 1)),)


@triton.jit
def _f16(loaded, grid, magic, item, step) -> Any:
    return (loaded[0].to(tl.float32),)


@triton.jit
def _load_bf16(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return (tl.load(words + 16 * tl.minimum(item * 8 + step, cols // 2 - 1)),)


@triton.jit
def _bf16(loaded, grid, magic, item, step) -> Any:
    pair = loaded[0]
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_pairs(loaded, item, step) -> Any:
    return (loaded[0],)


@triton.jit
def _load_bf16_odd(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    k = tl.minimum(item * 16 + step, cols - 1)
    pair = tl.load(words + 16 * tl.maximum(tl.minimum(k, cols - 2) // 2, 0))
    last = tl.load(halves + 16 * (cols - 1)).to(tl.int16, bitcast=True).to(tl.int32)
    return (tl.where(k == cols - 1, last << 16, tl.where(k % 2 == 0, pair << 16, pair & -65536)),)


F32 = DeviceFormat("F32", _load_f32, _f32, steps=16, width=1, items_per_tile=0, tile_units=4)
F16 = DeviceFormat("F16", _load_f16, _f16, steps=16, width=1, items_per_tile=0, tile_units=2)
BF16 = DeviceFormat("BF16", _load_bf16, _bf16, steps=8, width=2, items_per_tile=0, tile_units=2, pairs=_bf16_pairs)
BF16_ODD = DeviceFormat("BF16_ODD", _load_bf16_odd, _f32, steps=16, width=1, items_per_tile=0, tile_units=2)
"""Of BF16 matrices with an odd number of columns, whose last k is not part of a pair."""
