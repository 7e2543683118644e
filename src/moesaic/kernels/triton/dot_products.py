"""Inner loop of products with a few tokens by tensor cores: rows of weights times columns of activations.

What decides is that the weights go from memory into the registers of the lanes that tensor cores take them from, and
that nothing is multiplied with them there but codes, two of which an instruction makes. A lane loads words of four rows
that lie side by side; rows and columns are numbered such that those are the ones that its part of a tile has. Scales
are applied to sums of all weights that share one, in float32. F is the format.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.products import tile_of
from moesaic.kernels.triton.thirds import RAISED, item_floats

__all__ = ["dot_products", "row_of"]

_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
_SUBNORMAL: tl.constexpr = tl.constexpr(133)  # the smallest bfloat16 is 2^-133


@triton.jit
def row_of(index) -> Any:
    """Which row of a block is row `index` of a tile."""
    return index // 32 * 32 + index % 8 * 4 + index // 8 % 4


@triton.jit
def _first(a, b) -> Any:
    return a


@triton.jit
def _operand(weights, p: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """Plane p's weights, bfloat16 [ROWS, n], from those of all planes in the order of pairs (`_weights`)."""
    first: tl.constexpr = p * F.width
    count: tl.constexpr = F.width // 2
    pairs = ()
    for i in tl.static_range(count):
        pairs = pairs + (tl.join(weights[first + 2 * i], weights[first + 2 * i + 1]),)
    if count == 1:
        tile = pairs[0]
    elif count == 2:
        tile = tl.join(pairs[0], pairs[1])
    else:
        tile = tl.join(tl.join(pairs[0], pairs[2]), tl.join(pairs[1], pairs[3]))
    tile = tl.reshape(tile, (4, 8, 4, F.steps // 4, ROWS // 32, 2, count))
    tile = tl.reshape(tl.permute(tile, (4, 2, 1, 6, 3, 0, 5)), (ROWS, F.steps * F.width, 1))
    # This does nothing, but the compiler does not look behind it. What it found there, that pairs are joined, would
    # make it choose an order of columns of which 16 are too few.
    return tl.reduce(tile, 2, _first).to(tl.bfloat16, bitcast=True)


@triton.jit
def _halves(word) -> Any:
    """The two bfloat16 of int32, as int16: where they go to, they are side by side again, and nothing is left of it."""
    return (word & 0xFFFF).to(tl.int16), (word >> 16).to(tl.int16)


@triton.jit
def _weights(loaded, grid, magic, item, step, F: tl.constexpr) -> Any:
    """The bfloat16 of an item's weights as int16, width for each plane, in the order of pairs.

    Tensors are [4, 8, 4, steps / 4, ROWS / 32]: step % 4, row / 4 % 8, row % 4, step / 4, row / 32.
    """
    planes: tl.constexpr = F.planes
    width: tl.constexpr = F.width
    out = ()
    if F.pairs is not None:
        words = F.pairs(loaded, item, step)
        for i in tl.static_range(planes * width // 2):
            out = out + _halves(words[i])
    else:
        codes = F.codes(loaded, grid, magic, item, step)
        for i in tl.static_range(planes * width):
            if width > 2:  # 0 and 2, 1 and 3 of four
                code = codes[i // 4 * 4 + i % 2 * 2 + i % 4 // 2]
            else:
                code = codes[i]
            out = out + (code.to(tl.bfloat16).to(tl.int16, bitcast=True),)
    return out


@triton.jit
def _activations(at, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """A third of a plane's activations, bfloat16 [n, TOKENS]."""
    size: tl.constexpr = F.steps * F.width
    quarter: tl.constexpr = size // 4
    part = tl.arange(0, 4)[:, None, None] * quarter
    values = tl.load(at + (part + tl.arange(0, TOKENS)[None, :, None] * size + tl.arange(0, quarter)[None, None, :]))
    values = tl.permute(tl.reshape(values, (4, TOKENS, size // 8, 2)), (2, 0, 3, 1))
    return tl.reshape(values, (size, TOKENS))


@triton.jit
def _dot(weights, activations, total) -> Any:
    if _INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16, and reads subnormal ones wrongly
        weights = (weights.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        activations = activations.to(tl.float32)
    return tl.dot(weights, activations, total)


@triton.jit
def _power(n: tl.constexpr) -> Any:
    return tl.full((1, 1), (127 + n) << 23, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load_activations(at, F: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr) -> Any:
    """Of an item's planes from FIRST to LAST all thirds, plane by plane."""
    thirds = at.to(tl.pointer_type(tl.bfloat16))
    out = ()
    for i in tl.static_range(FIRST * 3, LAST * 3):
        out = out + (_activations(thirds + i * (TOKENS * F.steps * F.width), F, TOKENS),)
    return out


@triton.jit
def _load_sums(at, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Of an item's activations, [1, TOKENS] each."""
    sums: tl.constexpr = F.third_sums
    out = ()
    for i in tl.static_range(sums):
        out = out + (tl.load(at + F.item * 3 * TOKENS // 2 + i * TOKENS + tl.arange(0, TOKENS)[None, :]),)
    return out


@triton.jit
def _add_item(
    total, loaded, activations, sums, at, grid, magic, n, step, F: tl.constexpr, TOKENS: tl.constexpr
) -> Any:  # fmt: skip
    """Adds the products of an item to `total`, [rows, TOKENS].

    Args:
        loaded: of the weights: what codes need, what scales need.
        activations: all of them, or none: then `at` points to them.
    """
    rows: tl.constexpr = total.shape[0]
    planes: tl.constexpr = F.planes
    together: tl.constexpr = F.planes // F.num_scales
    weights = _weights(loaded[0], grid, magic, n, step, F)
    scales = ()
    if F.scales is not None:
        scales = F.scales(loaded[1], n, F)
    part = total
    for p in tl.static_range(planes):
        if p % together == 0 and F.scales is not None:
            part = tl.zeros((rows, TOKENS), tl.float32)
        tile = _operand(weights, p, F, rows)
        if len(activations) > 0:
            for third in tl.static_range(3):
                part = _dot(tile, activations[p * 3 + third], part)
        else:
            values = _load_activations(at, F, TOKENS, p, p + 1)
            for third in tl.static_range(3):
                part = _dot(tile, values[third], part)
        if F.scales is None:
            total = part
        elif (p + 1) % together == 0:
            scale = scales[p // together]
            if len(F.pair_bits) > 0:
                raised = scale * _power(_SUBNORMAL - RAISED - F.pair_bits[p])
            else:
                raised = scale * _power(-RAISED)
            total = tl.fma(tl.broadcast_to(raised, part.shape), part, total)
            if F.third_sums > 0:
                if F.has_offset:
                    offset = scales[F.num_scales + p // together]
                else:
                    offset = scale * (-1.0 * F.zero)
                added = tl.broadcast_to(sums[p // together], part.shape)
                total = tl.fma(tl.broadcast_to(offset, part.shape), added, total)
    return total


@triton.jit
def dot_products(
    x, words, halves, bytes, grid, magic, first_panel, num_panels, panel_units, cols, num_items, first, last,
    F: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr, AHEAD: tl.constexpr,
) -> Any:  # fmt: skip
    """Products of ROWS rows with TOKENS tokens: float32 [ROWS, TOKENS], row i being that of `row_of`.

    Args:
        x: activations as `thirds`.
        first_panel: of the rows; those behind the last panel are its rows.
        first, last: the iterations to do, of ITEMS items each, which num_items is a multiple of.
        AHEAD: whether all activations of an iteration come with its weights.
    """
    step = tl.arange(0, F.steps // 4)[None, None, None, :, None] * 4 + tl.arange(0, 4)[:, None, None, None, None]
    high, low = tl.arange(0, 8)[None, :, None, None, None], tl.arange(0, 4)[None, None, :, None, None]
    block = tl.arange(0, ROWS // 32)[None, None, None, None, :]
    panel = tl.minimum(first_panel + block * 2 + high // 4, num_panels - 1).to(tl.int64) * panel_units
    row = high % 4 * 4 + low
    tiles = words + panel * 4 + row, halves + panel * 8 + row, bytes + panel * 16 + row
    own = row_of(tl.arange(0, ROWS)[:, None])
    panel = tl.minimum(first_panel + own // 16, num_panels - 1).to(tl.int64) * panel_units
    row = own % 16
    scale_tiles = words + panel * 4 + row, halves + panel * 8 + row, bytes + panel * 16 + row
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for iteration in range(first, last):
        loaded = ()
        for i in tl.static_range(ITEMS):
            at = tile_of(tiles[0], tiles[1], tiles[2], iteration * ITEMS + i, num_items, F)
            own_item = (F.load(at[0], at[1], at[2], at[3], cols, step, F),)
            if F.scales is not None:
                at = tile_of(scale_tiles[0], scale_tiles[1], scale_tiles[2], iteration * ITEMS + i, num_items, F)
                own_item = own_item + (F.load_scales(at[0], at[1], at[2], at[3], F),)
            loaded = loaded + (own_item,)
        activations = ()
        sums = ()
        for i in tl.static_range(ITEMS):
            at = x + (iteration * ITEMS + i) * item_floats(F, TOKENS)
            if AHEAD:
                activations = activations + (_load_activations(at, F, TOKENS, 0, F.planes),)
            else:
                activations = activations + ((),)
            sums = sums + (_load_sums(at, F, TOKENS),)
        tl.debug_barrier()  # or the compiler puts loads off until others are there
        for i in tl.static_range(ITEMS):
            item = iteration * ITEMS + i
            n = item
            if F.items_per_tile > 0:
                n = item % F.items_per_tile
            at = x + item * item_floats(F, TOKENS)
            total = _add_item(total, loaded[i], activations[i], sums[i], at, grid, magic, n, step, F, TOKENS)
    if F.scales is None:
        total = total * _power(-RAISED)
    return total
