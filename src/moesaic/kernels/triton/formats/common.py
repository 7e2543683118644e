"""Parts that formats share: bit fields of words as floats. It knows no format."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["MAGIC", "byte_codes", "field"]

MAGIC = 0x4B000000
"""What `magic` has to be: float32 2^23."""


@triton.jit
def field(word, high, magic, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The bits `mask` from `bit` on of int32 `word`, less `zero`, as float32; `high` is `word >> 16`.

    The bits become the lowest before the point of a float 2^n + bits: an operation on integers and one on floats. To
    make it one, and not two, of integers `magic` is an argument of the kernel: it has the bits of 2^23, but if the
    compiler knew, it would not keep them in a register. Bits in `flip` are inverted first.
    """
    if bit + 8 <= 23:
        part = (word & (mask << bit)) ^ (magic - ((bit << 23) - (flip << bit)))
        return part.to(tl.float32, bitcast=True) - ((1 << (23 - bit)) + zero)
    else:
        part = (high & (mask << (bit - 16))) ^ (magic - (((bit - 16) << 23) - (flip << (bit - 16))))
        return part.to(tl.float32, bitcast=True) - ((1 << (39 - bit)) + zero)


@triton.jit
def byte_codes(quad, magic, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The four fields of a word that begin at `bit` of each byte."""
    high = quad >> 16
    return (
        field(quad, high, magic, bit, mask, zero, flip),
        field(quad, high, magic, bit + 8, mask, zero, flip),
        field(quad, high, magic, bit + 16, mask, zero, flip),
        field(quad, high, magic, bit + 24, mask, zero, flip),
    )
