"""Elementwise steps on a GPU: what is added to the hidden states of a layer, in one launch, and gates. No models."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe

__all__ = ["add_gated_", "add_scaled_", "check_parts", "combine", "gate_heads_"]

_BLOCK = 1024


def add_scaled_(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`x += scale * y`, float32 `[rows, width]`, rows contiguous (residuals; Granite scales them)."""
    return combine(x, y, None, None, scale)


def add_gated_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x += sigmoid(gate) * y` with one gate per row (shared experts of Qwen)."""
    return combine(x, y, None, None, shared_gate=gate)


def combine(
    hidden: torch.Tensor,
    shared: torch.Tensor | None,
    cached: torch.Tensor | None,
    from_cpu: torch.Tensor | None,
    scale: float = 1.0,
    shared_gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`hidden += scale * (sigmoid(shared_gate) * shared + cached + from_cpu)` in place, without those that are None.

    Args:
        hidden: float32 `[rows, width]`, rows contiguous, like all here.
        shared: what the shared experts gave.
        cached: what the experts on the GPU gave.
        from_cpu: what the experts on the CPU gave; may lie in pinned memory.
        scale: of what is added (Granite scales residuals).
        shared_gate: float32 `[rows]` or `[rows, 1]`: the factor of shared before its sigmoid; None: 1.

    Returns:
        hidden.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    parts = (shared, cached, from_cpu)
    check_parts(hidden, *parts, shared_gate)
    rows, width = hidden.shape
    if rows == 0 or all(x is None for x in parts):
        return hidden
    _combine_kernel[(rows, triton.cdiv(width, _BLOCK))](
        hidden,
        *(hidden if x is None else x for x in parts),
        hidden if shared_gate is None else shared_gate,
        hidden.stride(0),
        *(0 if x is None else x.stride(0) for x in parts),
        0 if shared_gate is None else shared_gate.stride(0),
        scale,
        width,
        SHARED=shared is not None,
        CACHED=cached is not None,
        FROM_CPU=from_cpu is not None,
        GATED=shared_gate is not None,
        BLOCK=_BLOCK,
    )
    return hidden


def check_parts(
    hidden: torch.Tensor,
    shared: torch.Tensor | None,
    cached: torch.Tensor | None,
    from_cpu: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
) -> None:
    """Check the arguments of `combine`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said there.
    """
    named = {"hidden": hidden, "shared": shared, "cached": cached, "from_cpu": from_cpu}
    for name, x in named.items():
        if x is not None and (x.dtype != torch.float32 or x.ndim != 2 or x.shape != hidden.shape or x.stride(-1) != 1):
            raise KernelError(f"{name} is {describe(x)}: expected float32 {list(hidden.shape)}, rows contiguous.")
    rows = len(hidden)
    if shared_gate is not None:
        if shared is None:
            raise KernelError("shared_gate is given without shared.")
        if shared_gate.dtype != torch.float32 or shared_gate.shape not in ((rows,), (rows, 1)):
            raise KernelError(f"shared_gate is {describe(shared_gate)}: expected float32 [{rows}].")


def gate_heads_(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x *= sigmoid(gate)` in place (what heads attended to in Qwen3-Next).

    Args:
        x: float32 `[tokens, heads, width]`, the last dimension contiguous, as gate's.
        gate: float32, shape of x.

    Returns:
        x.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    for name, part in (("x", x), ("gate", gate)):
        if part.dtype != torch.float32 or part.ndim != 3 or part.shape != x.shape or part.stride(-1) != 1:
            raise KernelError(f"{name} is {describe(part)}: expected float32 {list(x.shape)}, the last contiguous.")
    tokens, heads, width = x.shape
    if tokens:
        pad = triton.next_power_of_2(width)
        _gate_kernel[(tokens, heads)](x, gate, *x.stride()[:2], *gate.stride()[:2], WIDTH=width, PAD=pad, num_warps=1)
    return x


@triton.jit
def _gate_kernel(x, gate, x_token, x_head, gate_token, gate_head, WIDTH: tl.constexpr, PAD: tl.constexpr):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, PAD)
    inside = cols < WIDTH
    place = x + token * x_token + head * x_head + cols
    factor = tl.load(gate + token * gate_token + head * gate_head + cols, mask=inside, other=0.0)
    tl.store(place, tl.load(place, mask=inside, other=0.0) / (1.0 + tl.exp(-factor)), mask=inside)


@triton.jit
def _combine_kernel(
    hidden,
    shared,
    cached,
    from_cpu,
    gate,
    hidden_stride,
    shared_stride,
    cached_stride,
    cpu_stride,
    gate_stride,
    scale,
    width,
    SHARED: tl.constexpr,
    CACHED: tl.constexpr,
    FROM_CPU: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros([BLOCK], tl.float32)
    if SHARED:
        part = tl.load(shared + row * shared_stride + cols, mask=inside, other=0.0)
        if GATED:
            part *= 1.0 / (1.0 + tl.exp(-tl.load(gate + row * gate_stride)))
        total += part
    if CACHED:
        total += tl.load(cached + row * cached_stride + cols, mask=inside, other=0.0)
    if FROM_CPU:
        total += tl.load(from_cpu + row * cpu_stride + cols, mask=inside, other=0.0)
    target = hidden + row * hidden_stride + cols
    tl.store(target, tl.load(target, mask=inside, other=0.0) + scale * total, mask=inside)
