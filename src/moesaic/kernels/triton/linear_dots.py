"""How products of a few tokens by tensor cores are cut into programs. It knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.linear_kernels import dots_kernel, sum_kernel
from moesaic.kernels.triton.views import WeightViews, grid_of

__all__ = ["MULTIPROCESSORS", "dot_items", "dot_splits", "several_tokens", "sum_parts"]

MULTIPROCESSORS = 132
"""Of a large GPU."""

_MOST_SPLITS = 32  # of the columns, or what is left to be added up takes longer than it saves
_ITERATIONS_AROUND = 2  # that beginning and ending a program take as long as


@dataclass(frozen=True, slots=True)
class DotShape:
    """Of programs for a few tokens by tensor cores, each of which is a warp.

    Attributes:
        rows: of a program.
        weights: of a row that are on their way at a time.
        ahead: whether all activations of those are, too.
        at_a_time: programs of a multiprocessor, by the registers that they need; a quarter of it has a quarter.
        without_pairs: the same of formats whose codes are looked up or computed one by one.
    """

    rows: int
    weights: int
    ahead: bool
    at_a_time: int
    without_pairs: int


_DOT_SHAPES = {8: DotShape(32, 64, True, 19, 12), 16: DotShape(32, 64, True, 12, 8), 32: DotShape(32, 64, False, 8, 8)}


def dot_items(weights: int, form: DeviceFormat, num_items: int) -> int:
    """Items of about so many weights of a row, a divisor of all."""
    items = max(1, weights // form.item)
    while num_items % items:
        items //= 2
    return items


def dot_splits(num_blocks: int, iterations: int, at_a_time: int) -> int:
    """Parts of the columns, such that it takes the fewest iterations, one after the other, until all are done.

    Where that is the same, those whose number has more in common with that of multiprocessors: then programs of one
    find each other's activations there.
    """

    def cost(splits: int) -> tuple[int, int]:
        rounds = -(-num_blocks * splits // (MULTIPROCESSORS * at_a_time))
        return rounds * (-(-iterations // splits) + _ITERATIONS_AROUND), splits // math.gcd(splits, MULTIPROCESSORS)

    return min(range(1, min(iterations, _MOST_SPLITS) + 1), key=cost)


def several_tokens(
    x: Lanes, views: WeightViews, form: DeviceFormat, rows: int, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Products with thirds by tensor cores; programs as `_DOT_SHAPES` says."""
    cols = x.cols
    shape = _DOT_SHAPES[x.thirds]
    num_items, num_blocks = form.num_items(cols), triton.cdiv(rows, shape.rows)
    groups = triton.cdiv(x.num_tokens, x.thirds)
    items = dot_items(shape.weights, form, num_items)
    at_a_time = shape.at_a_time if form.pairs is not None else shape.without_pairs
    iterations = triton.cdiv(num_items // items, dot_splits(num_blocks * groups, num_items // items, at_a_time))
    splits = triton.cdiv(num_items // items, iterations)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, x.num_tokens, rows, dtype=torch.float32, device=out.device)
    inner_bias = bias if splits == 1 else None
    dots_kernel[(splits, num_blocks, groups)](
        x.values,
        views.words,
        views.halves,
        views.bytes,
        grid_of(form, views),
        MAGIC,
        x.values if inner_bias is None else inner_bias,
        parts,
        parts.stride(-2),
        0 if splits == 1 else parts.stride(0),
        x.num_tokens,
        rows,
        cols,
        num_items,
        form.panel_units(cols),
        iterations,
        form,
        x.thirds,
        shape.rows,
        items,
        shape.ahead,
        inner_bias is not None,
        num_warps=1,
        num_stages=1,
    )
    if splits > 1:
        sum_parts(parts, bias, out)


def sum_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Add up parts of the columns, float32 `[parts, tokens, rows]`."""
    splits, num_tokens, rows = parts.shape
    sum_kernel[(triton.cdiv(rows, 128), num_tokens)](
        parts, parts if bias is None else bias, out, out.stride(0), rows, parts.stride(0), splits, bias is not None
    )
