"""Inner loops of the products: what a program does with the panels it is given. It knows no format and no model.

Arguments that come in families: `words`, `halves` and `bytes` are one address as pointers to int32, float16 and uint8;
`grid` is the format's codebook, if it has one, and `magic` is MAGIC; F is the format.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["at_panel", "lane_products", "panel_products", "side_by_side", "tile_of", "tile_products", "zeros"]

_LOADS: tl.constexpr = tl.constexpr(256)
"""Of activations in the body of a loop, at most: a pass of the compiler takes time with the square of them."""


@triton.jit
def tile_of(words, halves, bytes, item, num_items, F: tl.constexpr) -> Any:
    """From pointers to the rows of a panel: to those of the tile that has an item, and the item's number in it.

    Items behind the last one are read as the last: their activations are zeros.
    """
    item = tl.minimum(item, num_items - 1)
    if F.items_per_tile > 0:
        tile = item // F.items_per_tile * F.tile_units
        words, halves, bytes = words + tile * 4, halves + tile * 8, bytes + tile * 16
        item = item % F.items_per_tile
    return words, halves, bytes, item


@triton.jit
def at_panel(words, halves, bytes, panel, row) -> Any:
    """Pointers to rows of a panel that begins `panel` times 16 bytes from an address, int64."""
    return words + panel * 4 + row, halves + panel * 8 + row, bytes + panel * 16 + row


@triton.jit
def zeros(COUNT: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """COUNT tensors [ITEMS, ROWS]."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ITEMS, ROWS), tl.float32),)
    return out


@triton.jit
def _add_step(
    parts, sums, x, x_stride, codes, step, SHAPE: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr,
    SUMMED: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds the products of a step to `parts`, and activations to `sums` where they are needed; see `lane_products`."""
    width: tl.constexpr = F.width
    groups: tl.constexpr = F.num_scales
    apart: tl.constexpr = F.planes // F.num_scales
    steps: tl.constexpr = F.steps
    new_parts = ()
    new_sums = ()
    for t in tl.static_range(TOKENS):
        for g in tl.static_range(groups):
            part = parts[t * groups + g]
            total = sums[t * groups + g]
            for p in tl.static_range(g * apart, (g + 1) * apart):
                for c in tl.static_range(width):
                    value = tl.load(x + t * x_stride + ((p * steps + step) * width + c) * 8)
                    part = tl.fma(codes[p * width + c], tl.broadcast_to(value, SHAPE), part)
                    if F.has_offset and not SUMMED:
                        total += value
            new_parts = new_parts + (part,)
            new_sums = new_sums + (total,)
    return new_parts, new_sums


@triton.jit
def lane_products(
    totals,
    x,
    x_stride,
    words,
    halves,
    bytes,
    grid,
    magic,
    item,
    cols,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMED: tl.constexpr,
) -> Any:
    """Adds the products of an item per lane and row to `totals`, TOKENS tensors [items, rows].

    Args:
        x: pointers [items, 1] to each lane's first activation of the first token, in `lanes`, x_stride floats apart.
        words, halves, bytes: of the tiles, [items, rows].
        item: int32 [items, 1], the item's number in its tile.
        SUMMED: whether the sums of an item's activations lie behind them; otherwise they are added up here.
    """
    steps: tl.constexpr = F.steps
    width: tl.constexpr = F.width
    groups: tl.constexpr = F.num_scales
    shape: tl.constexpr = totals[0].shape
    if F.scales is None:
        parts = totals
    else:
        parts = zeros(TOKENS * groups, shape[0], shape[1])
    sums = zeros(TOKENS * groups, shape[0], 1)
    together: tl.constexpr = max(1, min(steps, _LOADS // (TOKENS * F.planes * width)))
    if together == steps:
        for step in tl.static_range(steps):
            codes = F.codes(words, halves, bytes, grid, magic, item, cols, step)
            parts, sums = _add_step(parts, sums, x, x_stride, codes, step, shape, F, TOKENS, SUMMED)
    else:
        for first in range(0, steps, together):
            for u in tl.static_range(together):
                codes = F.codes(words, halves, bytes, grid, magic, item, cols, first + u)
                parts, sums = _add_step(parts, sums, x, x_stride, codes, first + u, shape, F, TOKENS, SUMMED)
    if F.scales is None:
        out = parts
    else:
        scales = F.scales(words, halves, bytes, item, F)
        out = ()
        for t in tl.static_range(TOKENS):
            result = totals[t]
            for g in tl.static_range(groups):
                result = tl.fma(scales[g], parts[t * groups + g], result)
                if F.has_offset:
                    total = sums[t * groups + g]
                    if SUMMED:
                        total = tl.load(x + t * x_stride + (F.item + g) * 8)
                    result = tl.fma(scales[groups + g], tl.broadcast_to(total, shape), result)
            out = out + (result,)
    return out


@triton.jit
def panel_products(
    x,
    x_stride,
    words,
    halves,
    bytes,
    grid,
    magic,
    panel,
    cols,
    num_items,
    first,
    last,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> Any:
    """Products of a panel with few tokens: TOKENS tensors [ITEMS, 16 rows], whose sums over items they are.

    Args:
        x: activations as `lanes`, x_stride floats from one token to the next.
        panel: int64, where the panel begins, in units of 16 bytes.
        first, last: the iterations to do, of ITEMS items each.
    """
    stride: tl.constexpr = (F.item + F.num_sums) * 8
    row = tl.arange(0, 16)[None, :]
    lane = tl.arange(0, ITEMS)[:, None]
    words, halves, bytes = at_panel(words, halves, bytes, panel, row)
    totals = zeros(TOKENS, ITEMS, 16)
    for iteration in range(first, last):
        item = iteration * ITEMS + lane
        at = x + (item // 8 * stride + item % 8)
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, item, num_items, F)
        totals = lane_products(
            totals, at, x_stride, tile_words, tile_halves, tile_bytes, grid, magic, n, cols, F, TOKENS, True
        )
    return totals


@triton.jit
def side_by_side(values, COUNT: tl.constexpr) -> Any:
    """COUNT tensors [items, rows] as one [items, rows, COUNT]; a power of two."""
    shape: tl.constexpr = values[0].shape
    for level in tl.static_range(1, 8):
        if (COUNT >> level) > 0:
            joined = ()
            for i in tl.static_range(COUNT >> level):
                joined = joined + (tl.join(values[i], values[i + (COUNT >> level)]),)
            values = joined
    return tl.reshape(values[0], (shape[0], shape[1], COUNT))


@triton.jit
def _chunk(codes, scales, gb: tl.constexpr, F: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Weights of a chunk, [16 items * 8, rows], of an item side by side; `codes` has its steps with all planes."""
    width: tl.constexpr = F.width
    planes: tl.constexpr = F.planes
    together: tl.constexpr = F.chunk_planes
    steps: tl.constexpr = F.chunk_steps
    weights = ()
    for u in tl.static_range(steps):
        for p in tl.static_range(gb * together, (gb + 1) * together):
            for c in tl.static_range(width):
                w = codes[(u * planes + p) * width + c]
                if F.scales is not None:
                    if F.has_offset:
                        w = tl.fma(
                            w, scales[p * F.num_scales // planes], scales[F.num_scales + p * F.num_scales // planes]
                        )
                    else:
                        w = w * scales[p * F.num_scales // planes]
                weights = weights + (w.to(DTYPE),)
    tile = side_by_side(weights, 8)
    return tl.reshape(tl.permute(tile, (0, 2, 1)), (128, tile.shape[1]))


@triton.jit
def tile_products(
    x,
    place,
    inside,
    num_places,
    words,
    halves,
    bytes,
    grid,
    magic,
    panel,
    row,
    cols,
    num_items,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
) -> Any:
    """Products of some rows with many tokens, by tensor cores: float32 [tokens, rows].

    Args:
        x: activations as `operands` of num_places tokens, in the type in which they and the weights are multiplied.
        place: int32 [tokens, 1], which of them; not read where `inside` is false.
        panel: int64 [1, rows] or a number, where each row's panel begins, in units of 16 bytes.
        row: int32 [1, rows], the row in the panel.
        PRECISION: of tl.dot.
    """
    chunk_steps: tl.constexpr = F.chunk_steps
    step_groups: tl.constexpr = F.steps // F.chunk_steps
    plane_groups: tl.constexpr = F.planes // F.chunk_planes
    dtype: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, 16)[:, None]
    at = x + (place.to(tl.int64) * 128 + tl.arange(0, 128)[None, :])
    apart = num_places.to(tl.int64) * 128
    words, halves, bytes = at_panel(words, halves, bytes, panel, row)
    total = tl.zeros((place.shape[0], row.shape[1]), tl.float32)
    scales = ()
    if F.scales is not None:
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, lane, num_items, F)
        scales = F.scales(tile_words, tile_halves, tile_bytes, n, F)
    # One loop over steps of all items, or the loads of each item's first steps would be waited for. Scales are those of
    # the item before until the first step of the next.
    for index in range(0, tl.cdiv(num_items, 16) * step_groups):
        item = index // step_groups * 16 + lane
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, item, num_items, F)
        if F.scales is not None:
            if index % step_groups == 0:
                scales = F.scales(tile_words, tile_halves, tile_bytes, n, F)
        codes = ()
        for u in tl.static_range(chunk_steps):
            step = index % step_groups * chunk_steps + u
            codes = codes + F.codes(tile_words, tile_halves, tile_bytes, grid, magic, n, cols, step)
        for gb in tl.static_range(plane_groups):
            weights = _chunk(codes, scales, gb, F, dtype)
            values = tl.load(at + (index * plane_groups + gb) * apart, mask=inside, other=0.0)
            total = tl.dot(values, weights, total, input_precision=PRECISION)
    return total
