"""The end of a layer and the norm of what follows, in one launch, for few tokens.

A program has a token: it adds up what is added to a hidden state, normalises it, and writes that in the order in which
the next product reads activations. Everything it needs is asked for at once, as some of it comes from far: the answer
of the CPU over PCIe, the norm's weights from VRAM. It knows no models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.activations import Lanes, column, store_blocks
from moesaic.kernels.triton.elementwise import check_parts, combine
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS
from moesaic.kernels.triton.norm import norm_lanes, rms_norm
from moesaic.kernels.triton.read_ahead import ReadAhead

__all__ = ["NormBefore", "SecondNorm", "combine_norm"]

_MOST = 16384
"""Activations that a program has in registers."""


class SecondNorm(NamedTuple):
    """Another norm of the same hidden states.

    Attributes:
        weight: float32 `[width]`.
        eps: added to the mean square.
        out: float32 `[tokens, width]`, contiguous, which it fills.
    """

    weight: torch.Tensor
    eps: float
    out: torch.Tensor


class NormBefore(NamedTuple):
    """The norm in front of products.

    Attributes:
        weight: float32 `[width]`.
        eps: added to the mean square.
        form: of the matrices.
        ahead: weights that will be needed then, for whoever has to wait first; None: none in particular.
        second: is computed, too; None: no other.
    """

    weight: torch.Tensor
    eps: float
    form: DeviceFormat
    ahead: ReadAhead | None = None
    second: SecondNorm | None = None


def combine_norm(
    hidden: torch.Tensor,
    shared: torch.Tensor | None,
    cached: torch.Tensor | None,
    from_cpu: torch.Tensor | None,
    scale: float,
    shared_gate: torch.Tensor | None,
    norm: NormBefore,
) -> Lanes:
    """`combine` of up to MAX_DECODE_TOKENS tokens, in place, and the norm of what hidden is then.

    Args:
        hidden, shared, cached, from_cpu, scale, shared_gate: see `combine`.
        norm: what follows.

    Raises:
        KernelError: there are more tokens, or a tensor has another shape, type or layout than said here.
    """
    rows, width = hidden.shape
    parts = (shared, cached, from_cpu)
    check_parts(hidden, *parts, shared_gate)
    weight, form = norm.weight, norm.form
    if not 1 <= rows <= MAX_DECODE_TOKENS:
        raise KernelError(f"hidden is {describe(hidden)}: expected 1 to {MAX_DECODE_TOKENS} rows.")
    second = norm.second
    given: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [("weight", weight, (width,))]
    if second is not None:
        given += [("the second norm's weight", second.weight, (width,)), ("its out", second.out, (rows, width))]
    for name, x, shape in given:
        if x.dtype != torch.float32 or x.shape != shape or not x.is_contiguous():
            raise KernelError(f"{name} is {describe(x)}: expected float32 {list(shape)}, contiguous.")
    lanes = Lanes.empty(rows, width, form, hidden.device)
    form = form if lanes.thirds else form.lanes
    blocks = triton.next_power_of_2(lanes.num_blocks)
    size = blocks * form.item * 8
    if size > _MOST:
        combine(hidden, *parts, scale, shared_gate)
        if second is not None:
            rms_norm(hidden, second.weight, second.eps, out=second.out)
        return norm_lanes(hidden, weight, norm.eps, norm.form)
    _combine_norm_kernel[(rows,)](
        hidden,
        *(hidden if x is None else x for x in parts),
        hidden if shared_gate is None else shared_gate,
        weight,
        weight if second is None else second.weight,
        lanes.values,
        hidden if second is None else second.out,
        hidden.stride(0),
        *(0 if x is None else x.stride(0) for x in parts),
        0 if shared_gate is None else shared_gate.stride(0),
        scale,
        norm.eps,
        norm.eps if second is None else second.eps,
        width,
        lanes.num_blocks,
        form,
        lanes.thirds,
        BLOCKS=blocks,
        SHARED=shared is not None,
        CACHED=cached is not None,
        FROM_CPU=from_cpu is not None,
        GATED=shared_gate is not None,
        TWICE=second is not None,
        num_warps=4 if size <= 2048 else 8 if size <= 8192 else 16,
    )
    return lanes


@triton.jit
def _combine_norm_kernel(
    hidden,
    shared,
    cached,
    from_cpu,
    gate,
    weight,
    second_weight,
    lanes,
    second,
    hidden_stride,
    shared_stride,
    cached_stride,
    cpu_stride,
    gate_stride,
    scale,
    eps,
    second_eps,
    cols,
    num_blocks,
    F: tl.constexpr,
    THIRDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,
    CACHED: tl.constexpr,
    FROM_CPU: tl.constexpr,
    GATED: tl.constexpr,
    TWICE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = F.item
    item = tl.arange(0, BLOCKS)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    k = column(item, tl.arange(0, size)[None, :, None], F)
    inside = k < cols
    if FROM_CPU:
        answer = tl.load(from_cpu + token * cpu_stride + k, mask=inside, other=0.0)
    values = tl.load(hidden + token * hidden_stride + k, mask=inside, other=0.0)
    if SHARED:
        part = tl.load(shared + token * shared_stride + k, mask=inside, other=0.0)
        if GATED:
            factor = tl.load(gate + token * gate_stride)
    if CACHED:
        from_cache = tl.load(cached + token * cached_stride + k, mask=inside, other=0.0)
    factors = tl.load(weight + k, mask=inside, other=0.0)
    if TWICE:
        second_factors = tl.load(second_weight + k, mask=inside, other=0.0)
    tl.debug_barrier()  # or the compiler puts some of these loads off until others are there
    total = tl.zeros([BLOCKS, size, 8], tl.float32)
    if SHARED:
        if GATED:
            part *= 1.0 / (1.0 + tl.exp(-factor))
        total += part
    if CACHED:
        total += from_cache
    if FROM_CPU:
        total += answer
    values += scale * total
    tl.store(hidden + token * hidden_stride + k, values, mask=inside)
    squares = tl.sum(tl.reshape(values * values, (BLOCKS * size * 8,)), 0)
    normed = values * (1.0 / tl.sqrt(squares / cols + eps)) * factors
    store_blocks(lanes, token.to(tl.int32), num_blocks, normed, F, BLOCKS, THIRDS)
    if TWICE:
        normed = values * (1.0 / tl.sqrt(squares / cols + second_eps)) * second_factors
        tl.store(second + token * cols + k, normed, mask=inside)
