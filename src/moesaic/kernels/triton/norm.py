"""RMS norms on a GPU, with the addition to the residual in front of them; as `ops.rms_norm` does it on the CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe

__all__ = ["add_rms_norm", "rms_norm"]


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


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor,
) -> None:
    for name, rows in (("x", x), ("out", out), ("residual", x if residual is None else residual)):
        if rows.dtype != torch.float32 or rows.ndim != 2 or rows.stride(-1) != 1 or rows.device != x.device:
            raise KernelError(f"{name} is {describe(rows)}: expected float32 [rows, width] on {x.device}.")
    check_shape("out", out, x.shape)
    num_rows, width = x.shape
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != (width,) or weight.stride(0) != 1):
        raise KernelError(f"weight is {describe(weight)}: expected float32 [{width}], contiguous.")
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
    values = tl.load(x + row * x_stride + cols, mask=inside, other=0.0)
    if ADDS:
        old = tl.load(residual + row * residual_stride + cols, mask=inside, other=0.0)
        values = old + scale * values
        tl.store(residual + row * residual_stride + cols, values, mask=inside)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    if WEIGHTED:
        values *= tl.load(weight + cols, mask=inside, other=0.0)
    tl.store(out + row * out_stride + cols, values, mask=inside)
