"""Parts that formats share: bit fields of words as floats. It knows no format."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["MAGIC", "byte_at", "byte_codes", "byte_pairs", "field", "one_word", "spread"]

MAGIC = 0x4B000000
"""What `magic` has to be: float32 2^23."""


@triton.jit
def field(word, high, magic, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The bits `mask` from `bit` on of int32 `word`, less `zero`, as float32; `high` is `word >> 16`.

    The bits become the lowest before the point of a float 2^n + bits: an operation on integers and one on floats. To
    make it one, and not two, of integers `magic` is an argument of the kernel: it has the bits of 2^23, but if the
    compiler knew, it would not keep them in a register. Bits in `flip` are inverted first.

    Without `magic` (None): the bits where they are, which as a float are a subnormal number, 2^(bit - 149) times as
    large, and `zero` is left to the caller; of what lies behind the float's 24 lowest bits, those in `high`.
    """
    if magic is None:
        if bit + 8 <= 24:
            part = word & (mask << bit)
        else:
            part = high & (mask << (bit - 16))
        return part.to(tl.float32, bitcast=True)
    elif bit + 8 <= 23:
        part = (word & (mask << bit)) ^ (magic - ((bit << 23) - (flip << bit)))
        return part.to(tl.float32, bitcast=True) - ((1 << (23 - bit)) + zero)
    else:
        part = (high & (mask << (bit - 16))) ^ (magic - (((bit - 16) << 23) - (flip << (bit - 16))))
        return part.to(tl.float32, bitcast=True) - ((1 << (39 - bit)) + zero)


@triton.jit
def byte_codes(quad, magic, bit: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr, flip: tl.constexpr) -> Any:
    """The four fields of a word that begin at `bit` of each byte; without `magic` 2^bit and 2^(bit + 8) as large."""
    high = quad >> 16
    if magic is None:
        return (
            field(quad, high, magic, bit, mask, 0, 0),
            field(quad, high, magic, bit + 8, mask, 0, 0),
            field(high, high, magic, bit, mask, 0, 0),
            field(high, high, magic, bit + 8, mask, 0, 0),
        )
    return (
        field(quad, high, magic, bit, mask, zero, flip),
        field(quad, high, magic, bit + 8, mask, zero, flip),
        field(quad, high, magic, bit + 16, mask, zero, flip),
        field(quad, high, magic, bit + 24, mask, zero, flip),
    )


@triton.jit
def byte_pairs(quad, bit: tl.constexpr, mask: tl.constexpr) -> Any:
    """The fields that begin at `bit` of bytes 0 and 2 of a word, and of bytes 1 and 3, as bits of two bfloat16 each.

    Up to 255 they are 2^-133 times the bits of the byte, be they subnormal or not.
    """
    fields: tl.constexpr = mask << bit | mask << (bit + 16)
    return quad & fields, quad >> 8 & fields


@triton.jit
def byte_at(bytes, unit) -> Any:
    """Unit `unit` of fields of bytes, int32: a byte for each row, or, from pointers to int32, those of four rows."""
    if bytes.dtype.element_ty == tl.int32:
        return tl.load(bytes + 4 * unit)
    else:
        return tl.load(bytes + 16 * unit).to(tl.int32)


@triton.jit
def spread(word) -> Any:
    """The lowest byte of integers for each row; or bytes of four rows each, int32 [items, 4], as [items, 16 rows]."""
    if len(word.shape) == 2 and word.shape[1] == 4:
        each = word[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        return tl.reshape(each & 255, (word.shape[0], 16))
    else:
        return word & 255


@triton.jit
def one_word(words, halves, bytes, item, cols, step, F: tl.constexpr) -> Any:
    """What a step of a format loads whose tiles begin with a word for each step of each item."""
    return (tl.load(words + 16 * (F.steps * item + step)),)
