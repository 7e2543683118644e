"""Packed matrices as plain ones, rows of floats, for the matrix products of the vendor's library. It knows no model."""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.activations import column
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.products import at_panel, item_scales, side_by_side, step_codes, tile_of
from moesaic.kernels.triton.views import WeightViews, grid_of

__all__ = ["expand"]

_ITEMS = 16


@triton.jit
def _store_pieces(
    codes, scales, at, item, num_items, cols, F: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
) -> Any:
    """Weights of COUNT steps from FIRST on, which `codes` has plane by plane and step by step."""
    planes: tl.constexpr = F.planes
    width: tl.constexpr = F.width
    size: tl.constexpr = COUNT * F.width
    c = tl.arange(0, size)[None, None, :]
    for p in tl.static_range(planes):
        weights = ()
        for step in tl.static_range(COUNT):
            for j in tl.static_range(width):
                w = codes[(step * F.planes + p) * width + j]
                if F.scales is not None:
                    w = w * scales[p * F.num_scales // F.planes]
                    if F.has_offset:
                        w += scales[F.num_scales + p * F.num_scales // F.planes]
                weights = weights + (w.to(at.dtype.element_ty),)
        tile = side_by_side(weights, size)
        k = column(item, (p * F.steps + FIRST) * width, F)[:, :, None] + c
        tl.store(at[:, :, None] + k, tile, mask=(item < num_items)[:, :, None] & (k < cols))


@triton.jit
def _expand_kernel(
    words, halves, bytes, grid, magic, out, cols, num_items, panel_units, F: tl.constexpr, ITEMS: tl.constexpr
) -> None:
    """A program has ITEMS items of a panel. Up to eight steps are stored at a time, or registers would not do."""
    steps: tl.constexpr = F.steps
    together: tl.constexpr = min(F.steps, 8)
    row = tl.arange(0, 16)[None, :]
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)[:, None]
    index = tl.program_id(1).to(tl.int64)
    words, halves, bytes = at_panel(words, halves, bytes, index * panel_units, row)
    tile_words, tile_halves, tile_bytes, n = tile_of(words, halves, bytes, item, num_items, F)
    scales = item_scales(tile_words, tile_halves, tile_bytes, n, F)
    at = out + (index * 16 + row) * cols
    for first in tl.static_range(0, steps, together):
        codes = ()
        for step in tl.static_range(first, first + together):
            codes = codes + step_codes(tile_words, tile_halves, tile_bytes, grid, magic, n, cols, step, F)
        _store_pieces(codes, scales, at, item, num_items, cols, F, first, together)


def expand(views: WeightViews, form: DeviceFormat, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix `[rows, cols]` as `dtype`, `[rows, cols]`, contiguous along a row."""
    num_panels, num_items = -(-rows // 16), form.num_items(cols)
    out = torch.empty(num_panels * 16, cols, dtype=dtype, device=views.words.device)
    _expand_kernel[(triton.cdiv(num_items, _ITEMS), num_panels)](
        views.words, views.halves, views.bytes, grid_of(form, views), MAGIC, out, cols, num_items,
        form.panel_units(cols), form, _ITEMS, num_warps=2,
    )  # fmt: skip
    return out[:rows]
