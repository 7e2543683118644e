"""Inner loop of products with many tokens, and what it shares with others. It knows no format and no model.

Arguments that come in families: `words`, `halves` and `bytes` are one address as pointers to int32, float16 and uint8;
`grid` is the format's codebook, if it has one, and `magic` is MAGIC; F is the format.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["at_panel", "item_scales", "side_by_side", "step_codes", "tile_of", "tile_products"]


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
def step_codes(words, halves, bytes, grid, magic, item, cols, step, F: tl.constexpr) -> Any:
    """The weights of a step, before scales, of all planes."""
    return F.codes(F.load(words, halves, bytes, item, cols, step, F), grid, magic, item, step)


@triton.jit
def item_scales(words, halves, bytes, item, F: tl.constexpr) -> Any:
    """Scales of an item and what is added; nothing where codes are the weights."""
    if F.scales is None:
        return ()
    else:
        return F.scales(F.load_scales(words, halves, bytes, item, F), item, F)


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
        scales = item_scales(tile_words, tile_halves, tile_bytes, n, F)
    # One loop over steps of all items, or the loads of each item's first steps would be waited for. Scales are those of
    # the item before until the first step of the next.
    for index in range(0, tl.cdiv(num_items, 16) * step_groups):
        item = index // step_groups * 16 + lane
        tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, item, num_items, F)
        if F.scales is not None:
            if index % step_groups == 0:
                scales = item_scales(tile_words, tile_halves, tile_bytes, n, F)
        codes = ()
        for u in tl.static_range(chunk_steps):
            step = index % step_groups * chunk_steps + u
            codes = codes + step_codes(tile_words, tile_halves, tile_bytes, grid, magic, n, cols, step, F)
        for gb in tl.static_range(plane_groups):
            weights = _chunk(codes, scales, gb, F, dtype)
            values = tl.load(at + (index * plane_groups + gb) * apart, mask=inside, other=0.0)
            total = tl.dot(values, weights, total, input_precision=PRECISION)
    return total
