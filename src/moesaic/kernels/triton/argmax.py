"""The place of the largest of many numbers on a GPU: logits to a token. It knows no models."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe

__all__ = ["argmax"]

_BLOCK = 1024  # numbers that a program has at a time
_MOST_PARTS = 128  # of a row: so many keep the whole card busy
_LOW_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_LEAST: tl.constexpr = tl.constexpr(-(2**31))


def argmax(x: torch.Tensor, out: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Where each row is largest; the first of equal ones, and a NaN is larger than all, as `ops.argmax` has it.

    Args:
        x: float32 `[rows, width]`, rows contiguous, width > 0.
        out: int64 `[rows]`, contiguous, on the device or in page-locked memory.
        largest: float32 `[rows]` like it, for the values there, if they are wanted.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] == 0 or x.stride(-1) != 1:
        raise KernelError(f"x is {describe(x)}: expected float32 [rows, width], rows contiguous, not empty.")
    rows, width = x.shape
    if out.dtype != torch.int64 or out.shape != (rows,) or not out.is_contiguous():
        raise KernelError(f"out is {describe(out)}: expected int64 [{rows}], contiguous.")
    if largest is not None and (
        largest.dtype != torch.float32 or largest.shape != (rows,) or not largest.is_contiguous()
    ):
        raise KernelError(f"largest is {describe(largest)}: expected float32 [{rows}], contiguous.")
    if rows:
        parts = min(_MOST_PARTS, triton.next_power_of_2(triton.cdiv(width, _BLOCK)))
        found = torch.empty(2, rows, parts, dtype=torch.int32, device=x.device)
        _parts_kernel[(rows, parts)](x, found, x.stride(0), width, PARTS=parts, BLOCK=_BLOCK, num_warps=4)
        values = found if largest is None else largest
        _whole_kernel[(rows,)](found, out, values, PARTS=parts, VALUES=largest is not None, num_warps=1)
    return out


@triton.jit
def _parts_kernel(x, found, stride, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of a part as a number that sorts as it does, and where it is."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = tl.cdiv(width, PARTS)
    begin = part * size
    end = tl.minimum(begin + size, width)
    largest = tl.full([BLOCK], _LEAST, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        col = begin + first + tl.arange(0, BLOCK)
        inside = col < end
        value = tl.load(x + row * stride + col, mask=inside, other=0.0)
        bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ _LOW_BITS, bits)
        order = tl.where(inside, tl.where(value != value, _LOW_BITS, order), _LEAST)
        place = tl.where(order > largest, col, place)
        largest = tl.maximum(order, largest)
    best = tl.max(largest, 0)
    at = found + row * PARTS + part
    tl.store(at, best)
    tl.store(at + tl.num_programs(0) * PARTS, tl.min(tl.where(largest == best, place, _LOW_BITS), 0))


@triton.jit
def _whole_kernel(found, out, values, PARTS: tl.constexpr, VALUES: tl.constexpr):
    row = tl.program_id(0)
    at = found + row * PARTS + tl.arange(0, PARTS)
    largest = tl.load(at)
    place = tl.load(at + tl.num_programs(0) * PARTS)
    best = tl.max(largest, 0)
    first = tl.min(tl.where(largest == best, place, _LOW_BITS), 0)
    tl.store(out + row, first.to(tl.int64))
    if VALUES:
        bits = tl.where(best < 0, best ^ _LOW_BITS, best)
        tl.store(values + row, bits.to(tl.float32, bitcast=True))
