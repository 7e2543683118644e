"""Inner loop of products with few tokens, by vector units: a lane has an item of four rows of a panel.

What decides is that all loads of an item are under way at the same time and that a weight costs two instructions where
its format allows it: its bits where they are, as a subnormal float, times an activation that is raised accordingly.

`words`, `halves` and `quarters` are one address as pointers to int32, float16 and int32 again, of which each is a byte
of four rows; `grid` is the format's codebook, if it has one; `constants` points to CONSTANTS; F is the format.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.formats.common import MAGIC

__all__ = ["CONSTANTS", "lane_products", "panel_products", "zeros"]

_RAISED: tl.constexpr = tl.constexpr(80)
"""Codes that are subnormal floats are multiplied with activations 2^80 times as large, which is exact for those below
2^48, and for the products of those above 2^-57."""

_ACTIVATIONS: tl.constexpr = tl.constexpr(32)
"""That a lane has in registers at a time."""

CONSTANTS = (MAGIC, 127 + _RAISED.value << 23, 0, 127 << 23)
"""What `constants` points to, as int32: numbers that a kernel reads only when its other loads are under way."""


@triton.jit
def zeros(COUNT: tl.constexpr, ITEMS: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """COUNT tensors [ITEMS, ROWS]."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ITEMS, ROWS), tl.float32),)
    return out


@triton.jit
def _load_item(words, halves, quarters, item, cols, F: tl.constexpr) -> Any:
    """All that a lane needs of its item, a tuple for each step and one for the scales."""
    steps: tl.constexpr = F.steps
    loaded = ()
    for step in tl.static_range(steps):
        loaded = loaded + (F.load(words, halves, quarters, item, cols, step, F),)
    if F.scales is not None:
        loaded = loaded + (F.load_scales(words, halves, quarters, item, F),)
    return loaded


@triton.jit
def _power(n: tl.constexpr) -> Any:
    return tl.full((1, 1), (127 + n) << 23, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _four(pairs) -> Any:
    """Four floats, [items, 1] each, from two integers of two floats: int64 [items, 2]."""
    a, b = tl.split(pairs)
    a, b = a[:, None], b[:, None]
    return (
        a.to(tl.int32).to(tl.float32, bitcast=True),
        (a >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        b.to(tl.int32).to(tl.float32, bitcast=True),
        (b >> 32).to(tl.int32).to(tl.float32, bitcast=True),
    )


@triton.jit
def _load_activations(pairs, x_stride, first, F: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Of steps from `first` on, in the order in which `_add_step` takes them, int64 [items, 2] four at a time."""
    span: tl.constexpr = max(1, 4 // F.width)
    four: tl.constexpr = max(4, F.width)
    planes: tl.constexpr = F.planes
    out = ()
    for step in tl.static_range(first, first + STEPS, span):
        for t in tl.static_range(TOKENS):
            for p in tl.static_range(planes):
                for quad in tl.static_range(0, four, 4):
                    at = pairs + t * (x_stride // 2) + ((p * F.steps + step) * F.width + quad) * 4
                    out = out + (tl.load(at),)
    return out


@triton.jit
def _add_step(
    parts, sums, activations, begin: tl.constexpr, codes, raised, F: tl.constexpr, PER_RUN: tl.constexpr,
    TOKENS: tl.constexpr, SUMMED: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds products of a step, or of as many as have four weights of a plane, to `parts`, PER_RUN of a token.

    Activations, of which theirs are those from `begin` on, are added to `sums` where nobody else did.
    """
    bits: tl.constexpr = F.bits
    four: tl.constexpr = max(4, F.width)
    apart: tl.constexpr = F.planes // PER_RUN
    new_parts = ()
    new_sums = ()
    for t in tl.static_range(TOKENS):
        for g in tl.static_range(PER_RUN):
            part, total = parts[t * PER_RUN + g], sums[t * PER_RUN + g]
            for p in tl.static_range(g * apart, (g + 1) * apart):
                for quad in tl.static_range(0, four, 4):
                    values = _four(activations[begin + ((t * F.planes + p) * four + quad) // 4])
                    if F.has_offset and not SUMMED:
                        total += (values[0] + values[1]) + (values[2] + values[3])
                    for j in tl.static_range(4):
                        value = values[j]
                        if len(bits) > 0:
                            value = value * (raised * _power(-bits[p * four + quad + j]))
                        elif F.scales is None:  # codes are what is loaded: one, only to wait
                            value = value * raised
                        part = tl.fma(codes[p * four + quad + j], tl.broadcast_to(value, part.shape), part)
            new_parts = new_parts + (part,)
            new_sums = new_sums + (total,)
    return new_parts, new_sums


@triton.jit
def _add_scaled(totals, parts, sums, scales, run: tl.constexpr, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Adds the parts of a run of steps to totals, each times its scale, and sums of activations times offsets."""
    per_run: tl.constexpr = len(parts) // TOKENS
    new = ()
    for t in tl.static_range(TOKENS):
        total = totals[t]
        for g in tl.static_range(per_run):
            part = parts[t * per_run + g]
            if len(F.bits) > 0:
                part = part * _power(149 - _RAISED)
            total = tl.fma(scales[run * per_run + g], part, total)
            if F.has_offset:
                added = tl.broadcast_to(sums[t * per_run + g], total.shape)
                total = tl.fma(scales[F.num_scales + run * per_run + g], added, total)
        new = new + (total,)
    return new


@triton.jit
def _item_products(
    totals,
    loaded,
    x,
    x_stride,
    grid,
    constants,
    lane,
    item,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMED: tl.constexpr,
) -> Any:
    """Adds the products of an item per lane and row to `totals`, TOKENS tensors [items, rows].

    Args:
        loaded: see `_load_item`.
        x: pointers [items, 1] to the blocks of each lane's activations of the first token, in `lanes`, x_stride floats
            from one token to the next; an even number.
        lane, item: int32 [items, 1], the item's number in its block and in its tile.
        SUMMED: whether the sums of an item's activations lie behind them; otherwise they are added up here.
    """
    steps: tl.constexpr = F.steps
    span: tl.constexpr = max(1, 4 // F.width)
    runs: tl.constexpr = max(1, F.num_scales // F.planes)  # of steps, whose scales are others
    per_run: tl.constexpr = F.num_scales // runs
    phase: tl.constexpr = min(steps // runs, max(span, _ACTIVATIONS // (F.planes * F.width * TOKENS)))
    quads: tl.constexpr = max(1, F.width // 4) * F.planes * TOKENS
    shape: tl.constexpr = totals[0].shape
    pairs = (x + lane * 4).to(tl.pointer_type(tl.int64)) + tl.arange(0, 2)[None, :]
    for run in tl.static_range(runs):
        if F.scales is None:
            parts = totals
        else:
            parts = zeros(TOKENS * per_run, shape[0], shape[1])
        sums = zeros(TOKENS * per_run, shape[0], 1)
        if F.has_offset and SUMMED:
            sums = ()
            for t in tl.static_range(TOKENS):
                for g in tl.static_range(per_run):
                    sums = sums + (tl.load(x + t * x_stride + (F.item + run * per_run + g) * 8 + lane),)
        for begin in tl.static_range(run * steps // runs, (run + 1) * steps // runs, phase):
            activations = _load_activations(pairs, x_stride, begin, F, phase, TOKENS)
            # All loads are under way before anything waits for one: to save registers, the compiler would delay them,
            # and wait for one after the other. What is computed from them needs what is loaded after the barrier.
            tl.debug_barrier()
            magic = tl.load(constants)
            raised = tl.load(constants + (1 if len(F.bits) > 0 else 3)).to(tl.float32, bitcast=True)
            zero = tl.load(constants + 2)
            for first in tl.static_range(begin, begin + phase, span):
                codes = ()
                for u in tl.static_range(span):
                    if runs > 1:  # or all codes would be made at once
                        codes = codes + F.codes((loaded[first + u][0] ^ zero,), grid, None, item, first + u)
                    elif len(F.bits) > 0:
                        codes = codes + F.codes(loaded[first + u], grid, None, item, first + u)
                    else:
                        codes = codes + F.codes(loaded[first + u], grid, magic, item, first + u)
                parts, sums = _add_step(
                    parts, sums, activations, (first - begin) // span * quads, codes, raised, F, per_run, TOKENS, SUMMED
                )
        if F.scales is None:
            totals = parts
        else:
            totals = _add_scaled(totals, parts, sums, F.scales(loaded[steps], item, F), run, F, TOKENS)
    return totals


@triton.jit
def lane_products(
    totals, x, x_stride, words, halves, grid, constants, panel, item, cols, F: tl.constexpr, TOKENS: tl.constexpr,
    SUMMED: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds the products of an item per lane with 16 rows to `totals`, TOKENS tensors [items, 16].

    Args:
        x: activations as `lanes`, x_stride floats from one token to the next, or pointers [items, 1] to them.
        panel: int64, where a panel begins, in units of 16 bytes; a number or [items, 1].
        item: int32 [items, 1]; none is behind the last one.
        SUMMED: see `_item_products`.
    """
    block: tl.constexpr = (F.item + F.num_sums) * 8
    n = item
    if F.items_per_tile > 0:
        panel = panel + item // F.items_per_tile * F.tile_units
        n = item % F.items_per_tile
    words, halves, row = words + panel * 4, halves + panel * 8, tl.arange(0, 16)[None, :]
    loaded = _load_item(words + row, halves + row, words + tl.arange(0, 4)[None, :], n, cols, F)
    return _item_products(
        totals, loaded, x + item // 8 * block, x_stride, grid, constants, item % 8, n, F, TOKENS, SUMMED
    )


@triton.jit
def panel_products(
    x,
    x_stride,
    words,
    halves,
    grid,
    constants,
    panel,
    lane,
    cols,
    num_items,
    first,
    last,
    F: tl.constexpr,
    TOKENS: tl.constexpr,
    APART: tl.constexpr,
) -> Any:
    """Products of a panel with few tokens: TOKENS tensors [lanes, 16 rows], whose sums over lanes they are.

    Args:
        x: activations as `lanes`, x_stride floats from one token to the next.
        panel: int64, where the panel begins, in units of 16 bytes; a number or, for each lane, [lanes, 1].
        lane: int32 [lanes, 1], from 0 to APART - 1: their first items.
        first, last: the iterations to do, of APART items each.
    """
    totals = zeros(TOKENS, lane.shape[0], 16)
    for iteration in range(first, last):
        item = iteration * APART + lane
        inside = tl.minimum(item, num_items - 1)
        added = lane_products(totals, x, x_stride, words, halves, grid, constants, panel, inside, cols, F, TOKENS, True)
        new = ()
        for t in tl.static_range(TOKENS):
            new = new + (tl.where(item < num_items, added[t], totals[t]),)
        totals = new
    return totals
