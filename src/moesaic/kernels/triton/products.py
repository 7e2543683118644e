"""Inner loops of the products: what a program does with the panels it is given. It knows no format and no model."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["panel_products", "tile_of", "tile_products"]


@triton.jit
def tile_of(words, halves, bytes, panel, item, num_items, F: tl.constexpr) -> Any:
    """Pointers to the tile that has an item, and the item's number in it.

    Items behind the last one are read as the last: their activations are zeros.
    """
    item = tl.minimum(item, num_items - 1)
    if F.items_per_tile > 0:
        panel = panel + (item // F.items_per_tile).to(tl.int64) * F.tile_units
        item = item % F.items_per_tile
    return words + panel * 4, halves + panel * 8, bytes + panel * 16, item


@triton.jit
def panel_products(
    x,
    x_stride,
    words,
    halves,
    bytes,
    grid,
    panel,
    row,
    cols,
    num_items,
    first,
    last,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> Any:
    """Products of one panel, or of rows of several, with few tokens.

    Args:
        x: activations as `lanes`, x_stride floats from one token to the next.
        words, halves, bytes: the address from which `panel` counts, as pointers to int32, float16 and uint8.
        grid: the format's codebook, if it has one.
        panel: int64 [1, rows] or a number, where the panel begins, in units of 16 bytes.
        row: int32 [1, rows], the row in the panel.
        first, last: the iterations to do, of ITEMS items each.

    Returns:
        TOKENS tensors float32 [rows].
    """
    planes: tl.constexpr = F.planes
    steps: tl.constexpr = F.steps
    width: tl.constexpr = F.width
    num_scales: tl.constexpr = F.num_scales
    stride: tl.constexpr = (F.item + F.num_sums) * 8
    lane = tl.arange(0, ITEMS)[:, None]
    zero = tl.zeros((ITEMS, row.shape[1]), tl.float32)
    totals = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (zero,)
    words, halves, bytes = words + row, halves + row, bytes + row
    for iteration in range(first, last):
        item = iteration * ITEMS + lane
        at = x + (item // 8 * stride + item % 8)
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, panel, item, num_items, F)
        parts = ()
        for _ in tl.static_range(TOKENS * num_scales):
            parts = parts + (zero,)
        for step in tl.static_range(steps):
            codes = F.codes(tile_words, tile_halves, tile_bytes, grid, n, cols, step)
            sums = ()
            for token in tl.static_range(TOKENS):
                for g in tl.static_range(num_scales):
                    part = parts[token * num_scales + g]
                    for p in tl.static_range(g * (planes // num_scales), (g + 1) * (planes // num_scales)):
                        for c in tl.static_range(width):
                            value = tl.load(at + token * x_stride + ((p * steps + step) * width + c) * 8)
                            part = tl.fma(codes[p * width + c], tl.broadcast_to(value, zero.shape), part)
                    sums = sums + (part,)
            parts = sums
        new = ()
        if F.scales is None:
            for token in tl.static_range(TOKENS):
                new = new + (totals[token] + parts[token],)
        else:
            scales = F.scales(tile_words, tile_halves, tile_bytes, n)
            for token in tl.static_range(TOKENS):
                total = totals[token]
                for g in tl.static_range(num_scales):
                    total = tl.fma(scales[g], parts[token * num_scales + g], total)
                    if F.has_offset:
                        value = tl.load(at + token * x_stride + (F.item + g) * 8)
                        total = tl.fma(scales[num_scales + g], tl.broadcast_to(value, zero.shape), total)
                new = new + (total,)
        totals = new
    results = ()
    for token in tl.static_range(TOKENS):
        results = results + (tl.sum(totals[token], axis=0),)
    return results


@triton.jit
def _columns_of(codes, p: tl.constexpr, scale, offset, F: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Weights of one plane of a step, [16 items * width, rows], an item's columns side by side."""
    width: tl.constexpr = F.width
    weights = ()
    for c in tl.static_range(width):
        w = codes[p * width + c]
        if F.scales is not None:
            w = tl.fma(w, scale, offset) if F.has_offset else w * scale
        weights = weights + (w.to(DTYPE),)
    if width == 4:
        both = tl.join(tl.join(weights[0], weights[2]), tl.join(weights[1], weights[3]))
        out = tl.reshape(tl.permute(both, (0, 2, 3, 1)), (64, both.shape[1]))
    elif width == 2:
        both = tl.join(weights[0], weights[1])
        out = tl.reshape(tl.permute(both, (0, 2, 1)), (32, both.shape[1]))
    else:
        out = weights[0]
    return out


@triton.jit
def tile_products(
    x,
    token,
    num_tokens,
    words,
    halves,
    bytes,
    grid,
    panel,
    row,
    cols,
    num_items,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
) -> Any:
    """Products of some rows with many tokens, by tensor cores: float32 [tokens, rows].

    Args:
        x: activations as `operands`, in the type in which they and the weights are multiplied.
        token: int32 [tokens, 1], which of the `num_tokens`.
        words, halves, bytes, grid: as for `panel_products`.
        panel: int64 [1, rows], where each row's panel begins, in units of 16 bytes.
        row: int32 [1, rows], the row in the panel.
        PRECISION: of tl.dot.
    """
    planes: tl.constexpr = F.planes
    steps: tl.constexpr = F.steps
    width: tl.constexpr = F.width
    num_scales: tl.constexpr = F.num_scales
    dtype: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16 * width)[None, :]
    inside = token < num_tokens
    at = x + (token.to(tl.int64) * (16 * width) + j)
    apart = num_tokens.to(tl.int64) * (16 * width)
    words, halves, bytes = words + row, halves + row, bytes + row
    total = tl.zeros((token.shape[0], row.shape[1]), tl.float32)
    for block in range(0, tl.cdiv(num_items, 16)):
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, panel, block * 16 + lane, num_items, F)
        if F.scales is not None:
            scales = F.scales(tile_words, tile_halves, tile_bytes, n)
        for step in range(0, steps):
            codes = F.codes(tile_words, tile_halves, tile_bytes, grid, n, cols, step)
            for p in tl.static_range(planes):
                if F.scales is None:
                    weights = _columns_of(codes, p, 0.0, 0.0, F, dtype)
                elif F.has_offset:
                    scale, offset = scales[p * num_scales // planes], scales[num_scales + p * num_scales // planes]
                    weights = _columns_of(codes, p, scale, offset, F, dtype)
                else:
                    weights = _columns_of(codes, p, scales[p * num_scales // planes], 0.0, F, dtype)
                values = tl.load(at + (block * (planes * steps) + p * steps + step) * apart, mask=inside, other=0.0)
                total = tl.dot(values, weights, total, input_precision=PRECISION)
    return total
