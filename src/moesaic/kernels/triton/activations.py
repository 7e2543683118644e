"""Activations in the orders in which the products read them. It knows no weights, only how a format walks a row.

`lanes`: `[tokens][blocks of 8 items]`, of which each is `[item / 4][8][4]`, then `[sums][8]`, for kernels whose lanes
have an item each: what lanes want at the same time lies side by side, four activations a lane. Behind the activations
of 8 items are their sums, one for each offset of the item. `lane_place` in `expert_kernels` says where a column lies.
`thirds`: three bfloat16 of each, for tensor cores; see `thirds.py`.
`operands`: `[blocks of 16 items][chunks][tokens][16 items][8]`, tiles of matrix products: a chunk is 8 activations of
an item, of a few steps and planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.expert_kernels import lane_place
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.thirds import store_item

__all__ = [
    "Lanes",
    "goes_by_thirds",
    "is_unpadded",
    "lanes_size",
    "operands_shape",
    "to_lanes",
    "to_operands",
    "to_thirds",
]

_LANE_ITEMS = 8
_OPERAND_ITEMS = 16
_LEAST_THIRDS, _MOST_THIRDS = 8, 32  # tokens that kernels are made for
_MIN_THIRDS = 3
"""Fewer tokens are not multiplied by tensor cores, which have eight of them even if fewer are there."""


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """Activations of a few tokens as `lanes` or `thirds`, for every product whose format reads them in this order.

    Attributes:
        values: float32 `[n, lanes_size]`, n the power of two that kernels are made for; or thirds, `[items, n]`. What
            there is for tokens behind the last one is undefined.
        num_tokens: of them.
        cols: activations of a token.
        order: `DeviceFormat.order` of the form for few tokens, or `thirds_order`.
        thirds: tokens that there is room for in thirds, which is what kernels are made for; 0: they are lanes.
    """

    values: torch.Tensor
    num_tokens: int
    cols: int
    order: tuple[int, ...]
    thirds: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of 8 items, which a token's row has."""
        if self.thirds:
            return int(self.values.shape[0]) // _LANE_ITEMS
        planes, steps, width, _, num_sums = self.order
        return int(self.values.shape[1]) // ((planes * steps * width + num_sums) * _LANE_ITEMS)

    @classmethod
    def empty(cls, num_tokens: int, cols: int, form: DeviceFormat, device: torch.device) -> Lanes:
        """To be written by a kernel, what pads a row included; thirds where products of the form take them."""
        if goes_by_thirds(form, num_tokens, cols):
            return cls._thirds(num_tokens, cols, form, _room(num_tokens, _MOST_THIRDS), 1, device)
        return cls._lanes(num_tokens, cols, form, device)

    @classmethod
    def _lanes(cls, num_tokens: int, cols: int, form: DeviceFormat, device: torch.device) -> Lanes:
        shape = triton.next_power_of_2(num_tokens), lanes_size(form, cols)
        return cls(torch.empty(shape, dtype=torch.float32, device=device), num_tokens, cols, form.lanes.order)

    @classmethod
    def _thirds(
        cls, num_tokens: int, cols: int, form: DeviceFormat, room: int, groups: int, device: torch.device
    ) -> Lanes:
        items = -(-form.num_items(cols) // _LANE_ITEMS) * _LANE_ITEMS if groups == 1 else groups * form.num_items(cols)
        size = form.item * 3 * room // 2 + form.third_sums * room
        values = torch.empty(items, size, dtype=torch.float32, device=device)
        return cls(values, num_tokens, cols, form.thirds_order, room)


@triton.jit
def column(n, e, F: tl.constexpr) -> Any:
    """Column of activation `e` of item `n`."""
    piece: tl.constexpr = F.steps * F.width
    apart: tl.constexpr = F.interleave * piece
    whole: tl.constexpr = F.interleave * F.item
    return n // F.interleave * whole + n % F.interleave * piece + e // piece * apart + e % piece


@triton.jit
def store_block(lanes, token, block, num_blocks, values, F: tl.constexpr, THIRDS: tl.constexpr = 0) -> None:
    """Write activations [item, 8] of a block of a token, and their sums; as thirds if THIRDS says for how many."""
    lane = tl.arange(0, 8)[None, :]
    if THIRDS > 0:
        store_item(lanes, block * 8 + lane, token, values, lane >= 0, F, THIRDS)
    else:
        size: tl.constexpr = F.item
        sums: tl.constexpr = F.num_sums
        e = tl.arange(0, size)[:, None]
        at = lanes + (token * num_blocks + block) * ((size + sums) * 8)
        tl.store(at + e // 4 * 32 + lane * 4 + e % 4, values)
        if sums > 0:
            groups = tl.sum(tl.reshape(values, (sums, size // sums, 8)), axis=1)
            tl.store(at + (size + tl.arange(0, sums)[:, None]) * 8 + lane, groups)


@triton.jit
def store_blocks(
    lanes, token, num_blocks, values, F: tl.constexpr, BLOCKS: tl.constexpr, THIRDS: tl.constexpr = 0
) -> None:
    """As `store_block`, activations [BLOCKS, item, 8]; blocks from `num_blocks` on are not there."""
    if THIRDS > 0:
        block, lane = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 8)[None, None, :]
        store_item(lanes, block * 8 + lane, token, values, (block < num_blocks) & (lane >= 0), F, THIRDS)
    else:
        _store_lanes(lanes, token, num_blocks, values, F, BLOCKS)


@triton.jit
def _store_lanes(lanes, token, num_blocks, values, F: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    size: tl.constexpr = F.item
    sums: tl.constexpr = F.num_sums
    block = tl.arange(0, BLOCKS)[:, None, None]
    lane, e = tl.arange(0, 8)[None, None, :], tl.arange(0, size)[None, :, None]
    at = lanes + (token * num_blocks + block) * ((size + sums) * 8)
    tl.store(at + e // 4 * 32 + lane * 4 + e % 4, values, mask=block < num_blocks)
    if sums > 0:
        groups = tl.sum(tl.reshape(values, (BLOCKS, sums, size // sums, 8)), axis=2)
        tl.store(at + (size + tl.arange(0, sums)[None, :, None]) * 8 + lane, groups, mask=block < num_blocks)


@triton.jit
def _lanes_kernel(x, out, cols, num_blocks, x_stride, F: tl.constexpr) -> None:
    block, token = tl.program_id(0), tl.program_id(1)
    k = column(block * 8 + tl.arange(0, 8)[None, :], tl.arange(0, F.item)[:, None], F)
    values = tl.load(x + token.to(tl.int64) * x_stride + k, mask=k < cols, other=0.0)
    store_block(out, token, block, num_blocks, values, F)


@triton.jit(do_not_specialize=["num_tokens"])
def _thirds_kernel(
    x, out, num_tokens, cols, x_stride, num_items, F: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr
) -> None:
    """A program has an item of TOKENS tokens."""
    item, group = tl.program_id(0), tl.program_id(1)
    own = tl.arange(0, TOKENS)[None, :]
    token = group * TOKENS + own
    k = column(item, tl.arange(0, F.item)[:, None], F)
    at = k
    if LANES:
        at = lane_place(k, F)
    values = tl.load(x + token.to(tl.int64) * x_stride + at, mask=(token < num_tokens) & (k < cols), other=0.0)
    store_item(out, group * num_items + item, own, values, own >= 0, F, TOKENS)


@triton.jit(do_not_specialize=["num_tokens"])
def _operands_kernel(x, out, num_tokens, cols, x_stride, F: tl.constexpr, TOKENS: tl.constexpr) -> None:
    """A program has 16 items of TOKENS tokens, reads them as they lie and changes the order of what it has."""
    planes: tl.constexpr = F.planes // F.chunk_planes
    steps: tl.constexpr = F.steps // F.chunk_steps
    chunks: tl.constexpr = F.item // 8
    size: tl.constexpr = 16 * F.item
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k = block * size + tl.arange(0, size)[None, :]
    rows = x + token.to(tl.int64)[:, None] * x_stride
    values = tl.load(rows + k, mask=(token < num_tokens)[:, None] & (k < cols), other=0.0).to(out.dtype.element_ty)
    shape: tl.constexpr = (
        TOKENS, 16 // F.interleave, planes, F.chunk_planes, F.interleave, steps, F.chunk_steps, F.width
    )  # fmt: skip
    values = tl.permute(tl.reshape(values, shape), (5, 2, 0, 1, 4, 6, 3, 7))
    values = tl.reshape(values, (chunks, TOKENS, 128))
    chunk = block * chunks + tl.arange(0, chunks)[:, None, None]
    at = out + (chunk.to(tl.int64) * num_tokens + token[None, :, None]) * 128 + tl.arange(0, 128)[None, None, :]
    tl.store(at, values, mask=(token < num_tokens)[None, :, None])


def lanes_size(form: DeviceFormat, cols: int) -> int:
    """Floats of one token."""
    form = form.lanes
    padded = -(-form.num_items(cols) // _LANE_ITEMS) * _LANE_ITEMS
    return padded * (form.item + form.num_sums)


def is_unpadded(form: DeviceFormat, cols: int) -> bool:
    """Whether a row of `lanes` has nothing behind the activations: who writes those has written all."""
    form = form.lanes
    return cols % form.item == 0 and form.num_items(cols) % _LANE_ITEMS == 0


def to_lanes(x: torch.Tensor, form: DeviceFormat) -> Lanes:
    """Activations float32 `[tokens, cols]`, rows any distance apart, as `lanes`."""
    num_tokens, cols = x.shape
    form = form.lanes
    lanes = Lanes._lanes(num_tokens, cols, form, x.device)
    num_blocks = lanes.num_blocks
    _lanes_kernel[(num_blocks, num_tokens)](x, lanes.values, cols, num_blocks, x.stride(0), form)
    return lanes


def goes_by_thirds(form: DeviceFormat, num_tokens: int, cols: int) -> bool:
    """Whether products with so many tokens take them as `thirds`."""
    return form.has_thirds and _MIN_THIRDS <= num_tokens <= _MOST_THIRDS and cols % form.item == 0


def _room(num_tokens: int, most: int) -> int:
    return int(max(_LEAST_THIRDS, min(most, triton.next_power_of_2(num_tokens))))


def to_thirds(x: torch.Tensor | Lanes, form: DeviceFormat, most: int = _MOST_THIRDS) -> Lanes:
    """Activations float32 `[tokens, cols]`, rows any distance apart, or lanes, as thirds of up to `most` at a time."""
    if isinstance(x, Lanes):
        values, num_tokens, cols = x.values, x.num_tokens, x.cols
    else:
        values, (num_tokens, cols) = x, x.shape
    room = _room(num_tokens, most)
    num_items, groups = form.num_items(cols), triton.cdiv(num_tokens, room)
    thirds = Lanes._thirds(num_tokens, cols, form, room, groups, values.device)
    _thirds_kernel[(num_items, groups)](
        values, thirds.values, num_tokens, cols, values.stride(0), num_items, form, isinstance(x, Lanes), room,
        num_warps=1 if room == _LEAST_THIRDS else 2,
    )  # fmt: skip
    return thirds


def operands_shape(form: DeviceFormat, num_tokens: int, cols: int) -> tuple[int, int, int, int]:
    """Blocks of items, chunks, tokens, activations of a chunk."""
    return -(-form.num_items(cols) // _OPERAND_ITEMS), form.item // 8, num_tokens, _OPERAND_ITEMS * 8


def to_operands(x: torch.Tensor, form: DeviceFormat, dtype: torch.dtype) -> torch.Tensor:
    """Activations `[tokens, cols]` as `dtype` [blocks, chunks, tokens, 128]."""
    num_tokens, cols = x.shape
    shape = operands_shape(form, num_tokens, cols)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    tokens = max(1, min(16, 8192 // (_OPERAND_ITEMS * form.item)))
    grid = (shape[0], triton.cdiv(num_tokens, tokens))
    _operands_kernel[grid](x, out, num_tokens, cols, x.stride(0), form, tokens)
    return out
