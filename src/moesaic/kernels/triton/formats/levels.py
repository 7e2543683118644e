"""IQ4_NL and IQ4_XS, whose 4 bits number 16 levels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import byte_at, one_word, spread
from moesaic.kernels.triton.formats.description import DeviceFormat

__all__ = ["IQ4_NL", "IQ4_XS"]

# Closer together where weights of a bell curve lie (ggml's kvalues_iq4nl).
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _levels() -> torch.Tensor:
    return torch.tensor(_LEVELS, dtype=torch.float32).view(torch.int32)


@triton.jit
def _level(word, grid, bit: tl.constexpr) -> Any:
    return tl.load(grid + (word >> bit & 15)).to(tl.float32, bitcast=True)


@triton.jit
def _iq4(loaded, grid, magic, item, step) -> Any:
    word = loaded[0]
    return (
        _level(word, grid, 0), _level(word, grid, 8), _level(word, grid, 16), _level(word, grid, 24),
        _level(word, grid, 4), _level(word, grid, 12), _level(word, grid, 20), _level(word, grid, 28),
    )  # fmt: skip


@triton.jit
def _load_iq4_nl_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return (tl.load(halves + 8 * 16),)


@triton.jit
def _iq4_nl_scales(loaded, item, F: tl.constexpr) -> Any:
    return (loaded[0].to(tl.float32),)


@triton.jit
def _load_iq4_xs_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    return byte_at(bytes, 128 + item // 2), byte_at(bytes, 132 + item // 4), tl.load(halves + 8 * 134)


@triton.jit
def _iq4_xs_scales(loaded, item, F: tl.constexpr) -> Any:
    low = loaded[0] >> (item % 2 * 4) & 0x0F0F0F0F
    high = loaded[1] >> (item % 4 * 2) & 0x03030303
    return (loaded[2].to(tl.float32) * (spread(low | high << 4) - 32).to(tl.float32),)


_IQ4: dict[str, Any] = {"planes": 2, "steps": 4, "grid": _levels}
IQ4_NL = DeviceFormat("IQ4_NL", one_word, _iq4, _load_iq4_nl_scales, _iq4_nl_scales, tile_units=18, **_IQ4)
IQ4_XS = DeviceFormat(
    "IQ4_XS", one_word, _iq4, _load_iq4_xs_scales, _iq4_xs_scales, items_per_tile=8, tile_units=136, **_IQ4
)
