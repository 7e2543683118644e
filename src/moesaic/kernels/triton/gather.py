"""Rows of a packed matrix as floats, for embeddings on a GPU. It knows no model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.activations import column
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.products import at_panel, item_scales, step_codes, tile_of
from moesaic.kernels.triton.views import grid_of, weight_views

__all__ = ["gather_rows"]


@triton.jit
def _gather_kernel(
    index,
    words,
    halves,
    bytes,
    grid,
    magic,
    out,
    rows,
    cols,
    num_items,
    panel_units,
    F: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """A program has ITEMS items of a row."""
    planes: tl.constexpr = F.planes
    steps: tl.constexpr = F.steps
    width: tl.constexpr = F.width
    n = tl.program_id(0)
    r = tl.minimum(tl.maximum(tl.load(index + n), 0), rows - 1).to(tl.int32)
    row = r % 16
    item = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    panel = (r // 16).to(tl.int64) * panel_units
    words, halves, bytes = at_panel(words, halves, bytes, panel, row)
    tile_words, tile_halves, tile_bytes, in_tile = tile_of(words, halves, bytes, item, num_items, F)
    scales = item_scales(tile_words, tile_halves, tile_bytes, in_tile, F)
    at = out + n.to(tl.int64) * cols
    for step in tl.static_range(steps):
        codes = step_codes(tile_words, tile_halves, tile_bytes, grid, magic, in_tile, cols, step, F)
        for p in tl.static_range(planes):
            for c in tl.static_range(width):
                value = codes[p * width + c]
                if F.scales is not None:
                    value = value * scales[p * F.num_scales // planes]
                    if F.has_offset:
                        value += scales[F.num_scales + p * F.num_scales // planes]
                k = column(item, (p * steps + step) * width + c, F)
                tl.store(at + k, value, mask=(k < cols) & (item < num_items))


def gather_rows(index: torch.Tensor, weight: DeviceTensor, matrix: int = 0) -> torch.Tensor:
    """Rows of one packed matrix.

    Args:
        index: int32 or int64 `[n]` on the weights' device. Numbers outside the matrix, which only the device can see,
            give its first or last row.
        weight: the stack that has the matrix.
        matrix: which matrix of the stack.

    Returns:
        float32 `[n, cols]`.

    Raises:
        UnsupportedFormatError: the format has no kernels on a GPU.
        KernelError: the index has another type, shape or device; there is no such matrix.
    """
    form: DeviceFormat = device_format(weight.format, weight.cols)
    if (
        index.dtype not in (torch.int32, torch.int64)
        or index.ndim != 1
        or index.device != weight.device
        or not index.is_contiguous()
    ):
        raise KernelError(f"index is {describe(index)}: expected int32 or int64 [n] on {weight.device}, contiguous.")
    out = torch.empty(index.shape[0], weight.cols, dtype=torch.float32, device=weight.device)
    if index.shape[0] == 0:
        return out
    views, items = weight_views(weight, matrix), 32
    num_items = form.num_items(weight.cols)
    _gather_kernel[(index.shape[0], triton.cdiv(num_items, items))](
        index,
        views.words,
        views.halves,
        views.bytes,
        grid_of(form, views),
        MAGIC,
        out,
        weight.rows,
        weight.cols,
        num_items,
        form.panel_units(weight.cols),
        form,
        items,
        num_warps=1,
    )
    return out
