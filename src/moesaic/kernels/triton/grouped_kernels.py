"""Kernels of routed experts for many tokens: pairs of a token and an expert, sorted by expert, a block at a time.

They know shapes and the formats' functions, no model.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.expert_kernels import activate, operand_place
from moesaic.kernels.triton.products import tile_products

__all__ = ["bring_kernel", "grouped_down_kernel", "grouped_sum_kernel", "grouped_up_kernel"]

_TABLES = ["first_blocks", "table"]  # rows of larger tables, aligned or not


@triton.jit
def _block_of(starts, first_blocks, num_experts, PAIRS: tl.constexpr) -> Any:
    """The expert of a program's block of pairs, num_experts if it has none; where the pairs are in the order."""
    block = tl.program_id(1)
    low = num_experts
    if block < tl.load(first_blocks + num_experts):
        low, high = 0, num_experts
        while low < high:  # the last expert whose blocks begin at or before this one
            middle = (low + high + 1) // 2
            if tl.load(first_blocks + middle) <= block:
                low = middle
            else:
                high = middle - 1
    expert = low
    place = tl.full((PAIRS,), 0, tl.int32)
    inside = place > 0
    if expert < num_experts:
        place = tl.load(starts + expert) + (block - tl.load(first_blocks + expert)) * PAIRS + tl.arange(0, PAIRS)
        inside = place < tl.load(starts + expert + 1)
    return expert, place, inside


@triton.jit(do_not_specialize=["num_tokens", "num_pairs", "num_experts"], do_not_specialize_on_alignment=_TABLES)
def grouped_up_kernel(
    gate_x,
    up_x,
    order,
    starts,
    first_blocks,
    table,
    words,
    halves,
    bytes,
    gate_grid,
    up_grid,
    magic,
    gate_bias,
    up_bias,
    inner,
    num_tokens,
    num_pairs,
    num_experts,
    gate_units,
    up_units,
    gate_stride_units,
    up_stride_units,
    gate_panel_units,
    up_panel_units,
    gate_items,
    up_items,
    rows,
    cols,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    KIND: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
    UP_PRECISION: tl.constexpr,
) -> None:
    """Gate, up and activation of ROWS rows for up to PAIRS pairs of one expert, as `operands` of down's format."""
    expert, place, inside = _block_of(starts, first_blocks, num_experts, PAIRS)
    if expert < num_experts:
        pair = tl.load(order + place, mask=inside, other=0).to(tl.int32)
        token = (pair // TOP_K)[:, None]
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
        near = tl.minimum(r, rows - 1)
        slot = tl.load(table + expert).to(tl.int64)
        at_bias = tl.cast(expert, tl.int64) * rows + r
        has = inside[:, None]
        panel = slot * up_stride_units + up_units + (near // 16).to(tl.int64) * up_panel_units
        up = tile_products(
            up_x, token, has, num_tokens, words, halves, bytes, up_grid, magic, panel, near % 16, cols, up_items, UP,
            UP_PRECISION,
        )  # fmt: skip
        if UP_BIAS:
            up += tl.load(up_bias + at_bias, mask=r < rows, other=0.0)
        if GATE is None:
            result = activate(up, 1.0, alpha, limit, KIND)
        else:
            panel = slot * gate_stride_units + gate_units + (near // 16).to(tl.int64) * gate_panel_units
            gate = tile_products(
                gate_x, token, has, num_tokens, words, halves, bytes, gate_grid, magic, panel, near % 16, cols,
                gate_items, GATE, GATE_PRECISION,
            )  # fmt: skip
            if GATE_BIAS:
                gate += tl.load(gate_bias + at_bias, mask=r < rows, other=0.0)
            result = activate(gate, up, alpha, limit, KIND)
        at = inner + operand_place(r, place[:, None], num_pairs, DOWN)
        tl.store(at, result.to(inner.dtype.element_ty), mask=has & (r < rows))


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_items"], do_not_specialize_on_alignment=_TABLES)
def grouped_down_kernel(
    inner,
    order,
    starts,
    first_blocks,
    table,
    weights,
    words,
    halves,
    bytes,
    grid,
    magic,
    bias,
    out,
    num_pairs,
    num_experts,
    down_units,
    stride_units,
    panel_units,
    num_items,
    rows,
    cols,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Down of ROWS rows for up to PAIRS pairs of one expert, each times its weight, to the pair's row of `out`."""
    expert, place, inside = _block_of(starts, first_blocks, num_experts, PAIRS)
    if expert < num_experts:
        pair = tl.load(order + place, mask=inside, other=0).to(tl.int32)
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
        near = tl.minimum(r, rows - 1)
        has = inside[:, None]
        slot = tl.load(table + expert).to(tl.int64)
        panel = slot * stride_units + down_units + (near // 16).to(tl.int64) * panel_units
        total = tile_products(
            inner, place[:, None], has, num_pairs, words, halves, bytes, grid, magic, panel, near % 16, cols, num_items,
            F, PRECISION,
        )  # fmt: skip
        if BIAS:
            total += tl.load(bias + tl.cast(expert, tl.int64) * rows + r, mask=r < rows, other=0.0)
        total *= tl.load(weights + pair, mask=inside, other=0.0)[:, None]
        tl.store(out + pair.to(tl.int64)[:, None] * rows + r, total, mask=has & (r < rows))


@triton.jit(do_not_specialize=["num_experts"], do_not_specialize_on_alignment=["table"])
def grouped_sum_kernel(
    pairs, experts, table, out, out_stride, rows, num_experts, TOP_K: tl.constexpr, ADD: tl.constexpr
) -> None:
    """Adds up the rows of a token's pairs whose experts have slots in a table, in their order."""
    token = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * 512 + tl.arange(0, 512)
    inside = r < rows
    total = tl.zeros((512,), tl.float32)
    if ADD:
        total += tl.load(out + token * out_stride + r, mask=inside, other=0.0)
    for k in range(0, TOP_K):
        e = tl.load(experts + token * TOP_K + k)
        if tl.load(table + e, mask=(e >= 0) & (e < num_experts), other=-1) >= 0:
            total += tl.load(pairs + (token * TOP_K + k) * rows + r, mask=inside, other=0.0)
    tl.store(out + token * out_stride + r, total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def bring_kernel(source, out, count, BLOCK: tl.constexpr) -> None:
    """A copy of memory of the CPU that the GPU sees; it does not wait for copy engines, which may be busy for long."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at, mask=at < count, other=0), mask=at < count)
