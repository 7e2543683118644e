"""Parts that formats share: bit fields of words as floats. It knows no format."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["byte_codes", "field"]


@triton.jit
def field(word, high, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The bits `mask` from `bit` on of int32 `word`, less `zero`, as float32; `high` is `word >> 16`.

    The bits become a part of the fraction of a float whose last place before the point they begin with: an operation on
    integers and one on floats. Bits in `flip` are inverted first.
    """
    if bit + 8 <= 23:
        part = (word & (mask << bit)) ^ (((150 - bit) << 23) | (flip << bit))
        magic: tl.constexpr = 1 << (23 - bit)
        return part.to(tl.float32, bitcast=True) - (magic + zero)
    else:
        part = (high & (mask << (bit - 16))) ^ (((166 - bit) << 23) | (flip << (bit - 16)))
        magic: tl.constexpr = 1 << (39 - bit)
        return part.to(tl.float32, bitcast=True) - (magic + zero)


@triton.jit
def byte_codes(quad, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The four fields of a word that begin at `bit` of each byte."""
    high = quad >> 16
    return (
        field(quad, high, bit, mask, zero, flip),
        field(quad, high, bit + 8, mask, zero, flip),
        field(quad, high, bit + 16, mask, zero, flip),
        field(quad, high, bit + 24, mask, zero, flip),
    )
