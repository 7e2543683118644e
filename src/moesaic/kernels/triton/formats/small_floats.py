"""FP8, MXFP4 and NVFP4: floats of 8 or 4 bits under scales.

Their bits become the lowest of the exponent and the highest of the fraction of a float32, which a power of two then
moves to the right exponent; the smallest among them are subnormal both before and after.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, one_word, spread
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["FP8", "FP8_32", "MXFP4", "NVFP4"]


@triton.jit
def _e4m3(word, byte: tl.constexpr) -> Any:
    """A byte of int32 words as e4m3; both NaN become 480."""
    bits = (word << (24 - 8 * byte)) >> 4 & -0x78100000
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _load_fp8(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    return (tl.load(halves + 16 * (16 * item + step)),)


@triton.jit
def _fp8(loaded, grid, magic, item, step) -> Any:
    pair = loaded[0].to(tl.int16, bitcast=True).to(tl.int32)
    return _e4m3(pair, 0), _e4m3(pair, 1)


@triton.jit
def _load_fp8_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(words + 4 * (F.tile_units - 4)),)


@triton.jit
def _fp8_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[0].to(tl.float32, bitcast=True),)


@triton.jit
def _e2m1(word, bit: tl.constexpr) -> Any:
    """Twice the e2m1 at a bit of int32 words."""
    bits = (word << (28 - bit)) >> 6 & -0x7E400000
    return bits.to(tl.float32, bitcast=True) * 2.0**127


@triton.jit
def _e2m1_planes(word) -> Any:
    return (
        _e2m1(word, 0), _e2m1(word, 8), _e2m1(word, 16), _e2m1(word, 24),
        _e2m1(word, 4), _e2m1(word, 12), _e2m1(word, 20), _e2m1(word, 28),
    )  # fmt: skip


@triton.jit
def _fp4(loaded, grid, magic, item, step) -> Any:
    return _e2m1_planes(loaded[0])


@triton.jit
def _load_mxfp4_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (byte_at(bytes, 16),)


@triton.jit
def _mxfp4_scales(loaded, item, F: tl.constexpr) -> Any:
    e = spread(loaded[0])
    bits = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23)
    return (bits.to(tl.float32, bitcast=True),)


@triton.jit
def _load_nvfp4_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (byte_at(bytes, 32 + item),)


@triton.jit
def _nvfp4_scales(loaded, item, F: tl.constexpr) -> Any:
    d = spread(loaded[0])
    bits = tl.where(d == 0x7F, 0, (d & 0x7F) << 20)  # NaN counts as zero
    return (bits.to(tl.float32, bitcast=True) * 2.0**119,)


_FP8: dict[str, Any] = {"steps": 16, "width": 2}
FP8 = DeviceFormat("FP8", _load_fp8, _fp8, _load_fp8_scales, _fp8_scales, items_per_tile=4, tile_units=132, **_FP8)
FP8_32 = DeviceFormat("FP8_32", _load_fp8, _fp8, _load_fp8_scales, _fp8_scales, tile_units=36, **_FP8)
MXFP4 = DeviceFormat("MXFP4", one_word, _fp4, _load_mxfp4_scales, _mxfp4_scales, planes=2, steps=4, tile_units=17)
NVFP4 = DeviceFormat(
    "NVFP4", one_word, _fp4, _load_nvfp4_scales, _nvfp4_scales, planes=2, steps=2, items_per_tile=4, tile_units=36
)
