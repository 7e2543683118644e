"""The device code of `linear`: products of packed panels with few tokens and with many. It knows no model."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.triton.dot_products import dot_products, row_of
from moesaic.kernels.triton.few_products import panel_products
from moesaic.kernels.triton.products import tile_products
from moesaic.kernels.triton.thirds import item_floats

__all__ = ["dots_kernel", "panels_kernel", "sum_kernel", "tiles_kernel"]


@triton.jit(do_not_specialize=["split_stride", "num_tokens", "num_items", "iterations"])
def panels_kernel(
    x,
    x_stride,
    words,
    halves,
    grid,
    constants,
    bias,
    out,
    out_stride,
    split_stride,
    num_tokens,
    rows,
    cols,
    num_items,
    panel_units,
    iterations,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """A program has a panel, a part of its columns, `iterations` of ITEMS items, and TOKENS tokens."""
    first_token = tl.program_id(0) * TOKENS
    index, split = tl.program_id(1), tl.program_id(2)
    first = split * iterations
    last = tl.minimum(first + iterations, tl.cdiv(num_items, ITEMS))
    panel = index.to(tl.int64) * panel_units
    x += first_token * x_stride
    lane = tl.arange(0, ITEMS)[:, None]
    totals = panel_products(
        x, x_stride, words, halves, grid, constants, panel, lane, cols, num_items, first, last, F, TOKENS, ITEMS
    )
    r = index * 16 + tl.arange(0, 16)
    for t in tl.static_range(TOKENS):
        token = first_token + t
        result = tl.sum(totals[t], axis=0)
        if HAS_BIAS:
            result += tl.load(bias + r, mask=r < rows, other=0.0)
        at = out + split.to(tl.int64) * split_stride + token * out_stride + r
        tl.store(at, result, mask=(r < rows) & (token + r * 0 < num_tokens))


@triton.jit(do_not_specialize=["split_stride"])
def sum_kernel(parts, bias, out, out_stride, rows, split_stride, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr) -> None:
    """Adds up the parts of a product, always in the same order."""
    r = tl.program_id(0) * 128 + tl.arange(0, 128)
    token = tl.program_id(1)
    total = tl.zeros((128,), tl.float32)
    for split in range(0, SPLITS):
        total += tl.load(parts + split * split_stride + token * rows + r, mask=r < rows, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + r, mask=r < rows, other=0.0)
    tl.store(out + token * out_stride + r, total, mask=r < rows)


@triton.jit(do_not_specialize=["split_stride", "num_tokens", "num_items", "iterations"])
def dots_kernel(
    x,
    words,
    halves,
    bytes,
    grid,
    magic,
    bias,
    out,
    out_stride,
    split_stride,
    num_tokens,
    rows,
    cols,
    num_items,
    panel_units,
    iterations,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """A program has ROWS rows, a part of their columns, `iterations` of ITEMS items, and TOKENS tokens.

    Neighbours have other parts: if the number of parts divides that of multiprocessors, or nearly so, programs that
    find the same activations in their first-level cache have the same part.
    """
    split, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = split * iterations
    last = tl.minimum(first + iterations, num_items // ITEMS)
    x += group.to(tl.int64) * num_items * item_floats(F, TOKENS)
    total = dot_products(
        x, words, halves, bytes, grid, magic, block * (ROWS // 16), tl.cdiv(rows, 16), panel_units, cols, num_items,
        first, last, F, TOKENS, ROWS, ITEMS, AHEAD,
    )  # fmt: skip
    r = block * ROWS + row_of(tl.arange(0, ROWS)[:, None])
    token = group * TOKENS + tl.arange(0, TOKENS)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + r, mask=r < rows, other=0.0)
    at = out + split.to(tl.int64) * split_stride + token.to(tl.int64) * out_stride + r
    tl.store(at, total, mask=(r < rows) & (token < num_tokens))


@triton.jit(do_not_specialize=["num_tokens"])
def tiles_kernel(
    x,
    words,
    halves,
    bytes,
    grid,
    magic,
    bias,
    out,
    out_stride,
    num_tokens,
    rows,
    cols,
    num_items,
    panel_units,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """A program has TOKENS tokens and ROWS rows; neighbours have the same rows, which they find in the L2 cache."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = tl.minimum(r, rows - 1)
    panel = (inside // 16).to(tl.int64) * panel_units
    total = tile_products(
        x,
        token,
        token < num_tokens,
        num_tokens,
        words,
        halves,
        bytes,
        grid,
        magic,
        panel,
        inside % 16,
        cols,
        num_items,
        F,
        PRECISION,
    )
    if HAS_BIAS:
        total += tl.load(bias + r, mask=r < rows, other=0.0)
    tl.store(out + token.to(tl.int64) * out_stride + r, total, mask=(token < num_tokens) & (r < rows))
