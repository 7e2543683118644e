"""Activations in the orders in which the products read them. It knows no weights, only how a format walks a row.

`lanes`: `[tokens][blocks of 8 items][item + sums][8]`, for kernels whose lanes have an item each: what lanes want at
the same time lies side by side. Behind the activations of 8 items are their sums, one for each offset of the item.
`operands`: `[blocks of 16 items][planes * steps][tokens][16 * width]`, tiles of matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.formats import DeviceFormat

__all__ = ["LANE_ITEMS", "OPERAND_ITEMS", "lanes_size", "to_lanes", "to_operands"]

LANE_ITEMS = 8
OPERAND_ITEMS = 16
_PADDED_ITEMS = 64  # the most items that a program of eight warps has at a time


@triton.jit
def column(n, e, F: tl.constexpr) -> Any:
    """Column of activation `e` of item `n`."""
    piece: tl.constexpr = F.steps * F.width
    apart: tl.constexpr = F.interleave * piece
    whole: tl.constexpr = F.interleave * F.item
    return n // F.interleave * whole + n % F.interleave * piece + e // piece * apart + e % piece


@triton.jit
def _lanes_kernel(x, out, cols, num_blocks, x_stride, F: tl.constexpr) -> None:
    size: tl.constexpr = F.item
    sums: tl.constexpr = F.num_sums
    block, token = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 8)[None, :]
    e = tl.arange(0, size)[:, None]
    k = column(block * 8 + lane, e, F)
    values = tl.load(x + token.to(tl.int64) * x_stride + k, mask=k < cols, other=0.0)
    at = out + (token * num_blocks + block) * ((size + sums) * 8) + lane
    tl.store(at + e * 8, values)
    if sums > 0:
        groups = tl.sum(tl.reshape(values, (sums, size // sums, 8)), axis=1)
        tl.store(at + (size + tl.arange(0, sums)[:, None]) * 8, groups)


@triton.jit
def _operands_kernel(x, out, num_tokens, cols, x_stride, F: tl.constexpr, TOKENS: tl.constexpr) -> None:
    parts: tl.constexpr = F.planes * F.steps
    width: tl.constexpr = F.width
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    j = tl.arange(0, 16 * width)[None, :]
    k = column(block * 16 + j // width, part * width + j % width, F)
    values = tl.load(x + token.to(tl.int64) * x_stride + k, mask=(token < num_tokens) & (k < cols), other=0.0)
    at = out + (tl.program_id(0).to(tl.int64) * num_tokens + token) * (16 * width) + j
    tl.store(at, values.to(out.dtype.element_ty), mask=token < num_tokens)


def lanes_size(form: DeviceFormat, cols: int) -> int:
    """Floats of one token."""
    padded = -(-form.num_items(cols) // _PADDED_ITEMS) * _PADDED_ITEMS
    return padded * (form.item + form.num_sums)


def to_lanes(x: torch.Tensor, form: DeviceFormat) -> torch.Tensor:
    """Activations `[tokens, cols]`, rows any distance apart, as float32 `[n, lanes_size]`.

    n is the power of two that kernels are made for; what rows behind the last token hold is undefined.
    """
    num_tokens, cols = x.shape
    size = lanes_size(form, cols)
    out = torch.empty(triton.next_power_of_2(num_tokens), size, dtype=torch.float32, device=x.device)
    num_blocks = size // ((form.item + form.num_sums) * LANE_ITEMS)
    _lanes_kernel[(num_blocks, num_tokens)](x, out, cols, num_blocks, x.stride(0), form)
    return out


def to_operands(x: torch.Tensor, form: DeviceFormat, dtype: torch.dtype) -> torch.Tensor:
    """Activations `[tokens, cols]` as `dtype` [blocks, planes * steps, tokens, 16 * width]."""
    num_tokens, cols = x.shape
    num_blocks = -(-form.num_items(cols) // OPERAND_ITEMS)
    parts = form.planes * form.steps
    shape = (num_blocks, parts, num_tokens, OPERAND_ITEMS * form.width)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    rows = 64 if num_tokens > 32 else 16
    grid = (num_blocks * parts, triton.cdiv(num_tokens, rows))
    _operands_kernel[grid](x, out, num_tokens, cols, x.stride(0), form, rows)
    return out
