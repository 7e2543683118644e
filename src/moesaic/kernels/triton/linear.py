"""Products of packed matrices on a GPU with activations of one to many tokens. It knows no model."""

from __future__ import annotations

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.limits import EXPANDED_WEIGHTS
from moesaic.kernels.triton.activations import Lanes, goes_by_thirds, to_lanes, to_operands, to_thirds
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.expand import expand
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.linear_dots import MULTIPROCESSORS, several_tokens, sum_parts
from moesaic.kernels.triton.linear_kernels import panels_kernel, tiles_kernel
from moesaic.kernels.triton.views import WeightViews, constants_on, grid_of, is_interpreted, weight_views

__all__ = ["MAX_DECODE_TOKENS", "linear"]

MAX_DECODE_TOKENS = 8
"""Up to so many tokens may come in the order of the product that comes next (`Lanes`)."""

_MAX_FEW_TOKENS = 16
"""Up to so many are multiplied by vector units where tensor cores cannot do so without loss (`goes_by_thirds`)."""

_EXPAND_FROM = 128  # from so many tokens on expanding a matrix takes less time than it saves

_MOST_PRODUCTS = 256
"""Of an item's weights with tokens, all of which are one piece of straight code, or compiling takes long. The rest of
the tokens are the next programs', which find the weights in the second-level cache."""


def warps_at_a_time(form: DeviceFormat, tokens: int) -> int:
    """Of programs for few tokens on a multiprocessor, by the registers that they need."""
    if form.item > 64:
        return 8
    return 16 if tokens == 1 else 12


def program_warps(programs: int, num_items: int, at_a_time: int) -> int:
    """Warps of each program for few tokens: as many as keep all programs on a large GPU at a time."""
    warps, most = 1, 16 if at_a_time == 16 else 8
    while warps < most and 8 * warps < num_items and 2 * programs * warps <= MULTIPROCESSORS * at_a_time:
        warps *= 2
    return warps


def decode_shape(num_panels: int, num_items: int, at_a_time: int) -> tuple[int, int, int]:
    """How a product of few tokens is cut: warps of a program, parts of the columns, iterations of a part."""
    warps = program_warps(num_panels, num_items, at_a_time)
    iterations = -(-num_items // (8 * warps))
    splits = max(1, min(iterations, MULTIPROCESSORS * 8 // (num_panels * warps)))
    iterations = -(-iterations // splits)
    return warps, -(-num_items // (8 * warps * iterations)), iterations


def _few_tokens(
    x: Lanes, views: WeightViews, form: DeviceFormat, rows: int, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    num_tokens, cols, lanes = x.num_tokens, x.cols, x.values
    form = form.lanes
    num_panels, num_items = -(-rows // 16), form.num_items(cols)
    tokens = min(triton.next_power_of_2(num_tokens), max(1, _MOST_PRODUCTS // form.item))
    warps, splits, iterations = decode_shape(num_panels, num_items, warps_at_a_time(form, tokens))
    parts = out if splits == 1 else torch.empty(splits, num_tokens, rows, dtype=torch.float32, device=lanes.device)
    inner_bias = bias if splits == 1 else None
    panels_kernel[(triton.cdiv(num_tokens, tokens), num_panels, splits)](
        lanes,
        lanes.stride(0),
        views.words,
        views.halves,
        grid_of(form, views),
        constants_on(lanes.device),
        lanes if inner_bias is None else inner_bias,
        parts,
        parts.stride(-2),
        0 if splits == 1 else parts.stride(0),
        num_tokens,
        rows,
        cols,
        num_items,
        form.panel_units(cols),
        iterations,
        form,
        tokens,
        8 * warps,
        inner_bias is not None,
        num_warps=warps,
    )
    if splits > 1:
        sum_parts(parts, bias, out)


def _many_tokens(
    x: torch.Tensor, views: WeightViews, form: DeviceFormat, rows: int, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    num_tokens, cols = x.shape
    dtype = operand_dtype(form)
    operands = to_operands(x, form, dtype)
    tokens = tile_tokens(num_tokens, dtype)
    num_rows, warps, stages = tile_shape(tokens, form)
    tiles_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(rows, num_rows))](
        operands,
        views.words,
        views.halves,
        views.bytes,
        grid_of(form, views),
        MAGIC,
        operands if bias is None else bias,
        out,
        out.stride(0),
        num_tokens,
        rows,
        cols,
        form.num_items(cols),
        form.panel_units(cols),
        form,
        tokens,
        num_rows,
        precision_of(dtype),
        bias is not None,
        num_warps=warps,
        num_stages=stages,
    )


def _expanded(
    x: torch.Tensor, views: WeightViews, form: DeviceFormat, rows: int, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """By the vendor's library, on matrices that are expanded first, a part of the rows at a time."""
    cols = x.shape[1]
    dtype = operand_dtype(form)
    a = x.to(dtype)
    step = max(16, EXPANDED_WEIGHTS // cols // 16 * 16)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        w = expand(views.panels(first // 16, form.panel_units(cols)), form, count, cols, dtype)
        part = out if count == rows else out[:, first : first + count]
        target = part if part.is_contiguous() else torch.empty(part.shape, dtype=torch.float32, device=x.device)
        if dtype == torch.float32:
            torch.mm(a, w.T, out=target)
        else:
            torch.mm(a, w.T, out_dtype=torch.float32, out=target)
        if target is not part:
            part.copy_(target)
    if bias is not None:
        out.add_(bias)


def operand_dtype(form: DeviceFormat) -> torch.dtype:
    """The type in which many tokens are multiplied: bfloat16, but F32 matrices (routers) lose nothing."""
    return torch.float32 if form.name == "F32" or is_interpreted() else torch.bfloat16


def tile_tokens(num_tokens: int, dtype: torch.dtype) -> int:
    """Tokens of a tile, for about so many."""
    return int(min(max(triton.next_power_of_2(num_tokens), 16), 64 if dtype == torch.float32 else 128))


def tile_shape(tokens: int, *forms: DeviceFormat) -> tuple[int, int, int]:
    """Rows of a tile, warps of a program and stages of its pipeline, such that shared memory and registers do.

    128 x 128 activations of 2 bytes are 32 KiB, as are the weights beside them; of 227 KiB that a multiprocessor has.
    """
    if tokens < 64 or any(operand_dtype(form) == torch.float32 for form in forms):
        return 64, 4, 2
    return 128, 8, 3 if all(form.planes == form.chunk_planes for form in forms) else 2


def precision_of(dtype: torch.dtype) -> str:
    """What tl.dot is asked for: all bits of float32, which only matters to that."""
    return "tf32x3" if dtype == torch.float32 and not is_interpreted() else "ieee"


def check_rows(name: str, x: torch.Tensor, width: int, device: torch.device) -> None:
    """Require float32 `[n, width]` on a device, contiguous along a row."""
    if (
        x.dtype != torch.float32
        or x.ndim != 2
        or x.shape[1] != width
        or x.device != device
        or (width > 1 and x.stride(1) != 1)
    ):
        raise KernelError(
            f"{name} is {describe(x)}: expected float32 [tokens, {width}] on {device}, contiguous along a row."
        )


def linear(
    x: torch.Tensor | Lanes,
    weight: DeviceTensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    index: int = 0,
) -> torch.Tensor:
    """`x @ W.T + bias` for one packed matrix; nothing waits for the device, so that a graph can capture it.

    Up to 16 tokens, and up to 32 where `goes_by_thirds`, lose no bits before they are added up in float32; of more,
    activations and weights are rounded to bfloat16 before they are multiplied (not with F32 weights). Results do not
    depend on timing, nor on what other tokens are, but on how many there are.

    Args:
        x: float32 `[tokens, cols]` on the weights' device, rows any distance apart; or up to MAX_DECODE_TOKENS tokens
            in the order of the weights' format.
        weight: the stack that has the matrix `[rows, cols]`.
        bias: float32 `[rows]`, contiguous.
        out: float32 `[tokens, rows]` for the result; rows may be any distance apart.
        index: which matrix of the stack.

    Returns:
        float32 `[tokens, rows]`, `out` if it was given.

    Raises:
        UnsupportedFormatError: the format has no kernels on a GPU.
        KernelError: a shape, a type, a device, an order or the index is not as described.
    """
    form = device_format(weight.format, weight.cols)
    if isinstance(x, Lanes):
        num_tokens = x.num_tokens
        _check_lanes(x, weight, form)
    else:
        num_tokens = x.shape[0]
        check_rows("x", x, weight.cols, weight.device)
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (weight.rows,) or not bias.is_contiguous()):
        raise KernelError(f"bias is {describe(bias)}: expected float32 [{weight.rows}], contiguous.")
    if out is None:
        out = torch.empty(num_tokens, weight.rows, dtype=torch.float32, device=weight.device)
    check_rows("out", out, weight.rows, weight.device)
    if out.shape[0] != num_tokens:
        raise KernelError(f"out has {out.shape[0]} rows: expected one for each of {num_tokens} tokens.")
    if num_tokens == 0:
        return out
    views = weight_views(weight, index)
    if isinstance(x, Lanes) and x.thirds:
        several_tokens(x, views, form, weight.rows, bias, out)
    elif goes_by_thirds(form, num_tokens, weight.cols):
        several_tokens(to_thirds(x, form), views, form, weight.rows, bias, out)
    elif isinstance(x, Lanes):
        _few_tokens(x, views, form, weight.rows, bias, out)
    elif num_tokens <= _MAX_FEW_TOKENS:
        _few_tokens(to_lanes(x, form), views, form, weight.rows, bias, out)
    elif num_tokens < _EXPAND_FROM:
        _many_tokens(x, views, form, weight.rows, bias, out)
    else:
        _expanded(x, views, form, weight.rows, bias, out)
    return out


def _check_lanes(x: Lanes, weight: DeviceTensor, form: DeviceFormat) -> None:
    form = form if x.thirds else form.lanes
    order = form.thirds_order if x.thirds else form.order
    if x.order != order or x.cols != weight.cols or not 0 < x.num_tokens <= MAX_DECODE_TOKENS:
        raise KernelError(
            f"x is {x.num_tokens} tokens of {x.cols} activations in the order {x.order}: expected 1 to "
            f"{MAX_DECODE_TOKENS} of {weight.cols} in that of {form.name}, {order}."
        )
