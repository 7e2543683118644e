"""RMS norms on a GPU, with the addition to the residual in front of them; as `ops.rms_norm` does it on the CPU.

Their weights were read a step ago at last, so they come from far: kernels ask for them together with the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe
from moesaic.kernels.triton.activations import Lanes, column, store_block
from moesaic.kernels.triton.formats import DeviceFormat

__all__ = ["add_rms_norm", "norm_lanes", "rms_norm"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    Args:
        x: float32 `[rows, width]`, rows contiguous.
        weight: float32 `[width]`, or None for ones.
        eps: added to the mean square.
        out: float32, shape of x, which it may be; allocated if None.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    out = torch.empty(x.shape, device=x.device) if out is None else out
    _launch(x, None, weight, eps, 1.0, out)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual += scale * x` in place, then the norm of that.

    Args:
        x: float32 `[rows, width]`, rows contiguous.
        residual: float32, shape of x.
        weight: float32 `[width]`, or None for ones.
        eps: added to the mean square.
        scale: factor of x (Granite scales residuals).
        out: float32, shape of x, which it may be; allocated if None.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    check_shape("residual", residual, x.shape)
    out = torch.empty(x.shape, device=x.device) if out is None else out
    _launch(x, residual, weight, eps, scale, out)
    return out


def norm_lanes(x: torch.Tensor, weight: torch.Tensor | None, eps: float, form: DeviceFormat) -> Lanes:
    """`rms_norm` of a few tokens, written in the order in which the products of a format read activations.

    Args:
        x: float32 `[tokens, width]`, rows contiguous.
        weight: float32 `[width]`, or None for ones.
        eps: added to the mean square.
        form: of the matrices that are multiplied next.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    _check(x, x, x, weight)
    num_tokens, width = x.shape
    lanes = Lanes.empty(num_tokens, width, form, x.device)
    num_blocks = lanes.num_blocks
    pad = triton.next_power_of_2(width)
    if num_tokens:
        _norm_lanes_kernel[(num_blocks, num_tokens)](
            x,
            x if weight is None else weight,
            lanes.values,
            x.stride(0),
            eps,
            width,
            num_blocks,
            form if lanes.thirds else form.lanes,
            lanes.thirds,
            PAD=pad,
            WEIGHTED=weight is not None,
            num_warps=4 if pad <= 2048 else 8,
        )
    return lanes


def _check(x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor, weight: torch.Tensor | None) -> None:
    for name, rows in (("x", x), ("out", out), ("residual", residual)):
        if rows.dtype != torch.float32 or rows.ndim != 2 or rows.stride(-1) != 1 or rows.device != x.device:
            raise KernelError(f"{name} is {describe(rows)}: expected float32 [rows, width] on {x.device}.")
    check_shape("out", out, x.shape)
    width = x.shape[1]
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != (width,) or weight.stride(0) != 1):
        raise KernelError(f"weight is {describe(weight)}: expected float32 [{width}], contiguous.")


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor,
) -> None:
    _check(x, x if residual is None else residual, out, weight)
    num_rows, width = x.shape
    if num_rows == 0:
        return
    _norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        x if weight is None else weight,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        scale,
        eps,
        WIDTH=width,
        PAD=triton.next_power_of_2(width),
        ADDS=residual is not None,
        WEIGHTED=weight is not None,
        num_warps=min(16, max(1, triton.next_power_of_2(width) // 512)),
    )


@triton.jit
def _norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    scale,
    eps,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ADDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, PAD)
    inside = cols < WIDTH
    if WEIGHTED:
        factors = tl.load(weight + cols, mask=inside, other=0.0)
    values = tl.load(x + row * x_stride + cols, mask=inside, other=0.0)
    if ADDS:
        old = tl.load(residual + row * residual_stride + cols, mask=inside, other=0.0)
    tl.debug_barrier()  # or the compiler puts some of these loads off until others are there
    if ADDS:
        values = old + scale * values
        tl.store(residual + row * residual_stride + cols, values, mask=inside)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    if WEIGHTED:
        values *= factors
    tl.store(out + row * out_stride + cols, values, mask=inside)


@triton.jit
def _norm_lanes_kernel(
    x, weight, lanes, x_stride, eps, cols, num_blocks, F: tl.constexpr, THIRDS: tl.constexpr, PAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """A program has a block of lanes, and makes the mean square of the whole row for itself."""
    block, token = tl.program_id(0), tl.program_id(1)
    k = column(block * 8 + tl.arange(0, 8)[None, :], tl.arange(0, F.item)[:, None], F)
    row = x + token.to(tl.int64) * x_stride
    if WEIGHTED:
        factors = tl.load(weight + k, mask=k < cols, other=0.0)
    values = tl.load(row + k, mask=k < cols, other=0.0)
    n = tl.arange(0, PAD)
    whole = tl.load(row + n, mask=n < cols, other=0.0)
    tl.debug_barrier()
    values *= 1.0 / tl.sqrt(tl.sum(whole * whole, 0) / cols + eps)
    if WEIGHTED:
        values *= factors
    store_block(lanes, token, block, num_blocks, values, F, THIRDS)
