"""Products of few tokens with experts that lie in slots: each token with each of its experts, float32 throughout.

`experts_decode` does all of it. Where gate and up are there before down is, `experts_inner` and `experts_down` do it in
two parts. `grouped_experts` is for many tokens; where slots are is said by `experts`.
"""

from __future__ import annotations

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.activations import lanes_size, to_lanes
from moesaic.kernels.triton.expert_kernels import decode_down_kernel, decode_up_kernel
from moesaic.kernels.triton.experts import ExpertLayout, bias_of, check_arena, check_choices, same_order, units_of
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS, program_warps, warps_at_a_time
from moesaic.kernels.triton.views import constants_on, grid_of, views_of

__all__ = ["MAX_DECODE_TOKENS", "MAX_PAIRS", "experts_decode", "experts_down", "experts_inner", "takes_pairs"]

MAX_PAIRS = 2048
"""Pairs of a token and an expert that `experts_decode` takes."""

_PAIRS_PER_EXPERT = 4  # on average; a matrix that is taken apart for tiles takes the time of about 7 products with it


def takes_pairs(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether pairs of a token and an expert one by one (`experts_decode`) are quicker than sorted (`ExpertPairs`)."""
    pairs = num_tokens * top_k
    return pairs <= MAX_PAIRS and (num_tokens <= MAX_DECODE_TOKENS or pairs <= _PAIRS_PER_EXPERT * num_experts)


def experts_decode(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    layout: ExpertLayout,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Weighted sum of each token's experts that have slots; made for few tokens of an expert, float32 throughout.

    Nothing waits for the device, so that a graph can capture it; results do not depend on timing.

    Args:
        x: float32 `[tokens, hidden]`, tokens * top_k <= MAX_PAIRS; rows may be any distance apart.
        slots: int32 `[tokens, top_k]`, the slot of each chosen expert, -1: leave it out.
        experts: int32 or int64 `[tokens, top_k]`, their numbers, which only biases need.
        weights: float32 `[tokens, top_k]`.
        arena: uint8 `[n]`, the slots, aligned to 64 bytes.
        layout: where slots are.
        out: float32 `[tokens, hidden]`, overwritten.
        accumulate: add to `out` instead.

    Returns:
        float32 `[tokens, hidden]`, zeros (or what `out` was) for a token none of whose experts has a slot.

    Raises:
        KernelError: a tensor is not as described.
    """
    return experts_down(
        experts_inner(x, slots, experts, arena, layout), slots, experts, weights, arena, layout, out, accumulate
    )


def experts_inner(
    x: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, arena: torch.Tensor, layout: ExpertLayout
) -> torch.Tensor:
    """What goes into the down projections, for which gates and ups have to be in their slots.

    Args:
        x, slots, experts, arena, layout: see `experts_decode`.

    Returns:
        float32 `[tokens * top_k, n]`, in the order in which down's kernel reads; undefined for pairs without a slot.

    Raises:
        KernelError: a tensor is not as described.
    """
    integers = (torch.int32, torch.int64)
    check_choices(x, arena.device, layout.hidden, {"slots": (slots, (torch.int32,)), "experts": (experts, integers)})
    check_arena(arena, layout, 1)
    num_tokens, top_k = slots.shape
    if num_tokens * top_k > MAX_PAIRS:
        raise KernelError(
            f"{num_tokens} tokens of {top_k} experts: experts_decode takes up to {MAX_PAIRS} pairs; use ExpertPairs."
        )
    size = lanes_size(layout.down.form, layout.intermediate)
    inner = torch.empty(num_tokens * top_k, size, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return inner
    gate, up = layout.gate or layout.up, layout.up
    gate_form, up_form = gate.form.lanes, up.form.lanes
    views = views_of(arena)
    up_lanes = to_lanes(x, up_form).values
    gate_lanes = up_lanes if same_order(gate_form, up_form) else to_lanes(x, gate_form).values
    gate_offset, gate_stride, gate_panel, gate_items = units_of(gate, gate_form)
    up_offset, up_stride, up_panel, up_items = units_of(up, up_form)
    num_panels = -(-layout.intermediate // 16)
    at_a_time = min(warps_at_a_time(gate_form, 1), warps_at_a_time(up_form, 1))
    warps = program_warps(num_tokens * top_k * num_panels, 2 * min(gate_items, up_items), at_a_time)
    gate_bias, has_gate_bias = bias_of(layout.gate, inner)
    up_bias, has_up_bias = bias_of(up, inner)
    decode_up_kernel[(num_panels, num_tokens * top_k)](
        gate_lanes, up_lanes, gate_lanes.stride(0), up_lanes.stride(0), slots, experts, views.words, views.halves,
        grid_of(gate_form, views), grid_of(up_form, views), constants_on(x.device), gate_bias, up_bias, inner, size,
        gate_offset, up_offset, gate_stride, up_stride, gate_panel, up_panel, gate_items, up_items, up.rows, up.cols,
        layout.activation.alpha, layout.activation.limit, top_k, None if layout.gate is None else gate_form, up_form,
        layout.down.form, layout.activation.name, has_gate_bias, has_up_bias, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return inner


def experts_down(
    inner: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    layout: ExpertLayout,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """The weighted sum of what `experts_inner` returned through the down projections; see `experts_decode`.

    Raises:
        KernelError: a tensor is not as described.
    """
    num_tokens, top_k = slots.shape
    if weights.dtype != torch.float32 or weights.shape != slots.shape or not weights.is_contiguous():
        raise KernelError(f"weights is {describe(weights)}: expected float32 {list(slots.shape)}, contiguous.")
    if out is None:
        make = torch.zeros if accumulate else torch.empty
        out = make(num_tokens, layout.hidden, dtype=torch.float32, device=inner.device)
    if num_tokens == 0:
        return out
    views = views_of(arena)
    down, form = layout.down, layout.down.form.lanes
    offset, stride, panel, items = units_of(down, form)
    num_panels = -(-layout.hidden // 16)
    warps = program_warps(num_tokens * num_panels, top_k * items, min(warps_at_a_time(form, 1), 12))
    bias, has_bias = bias_of(down, inner)
    decode_down_kernel[(num_panels, num_tokens)](
        inner, inner.stride(0), slots, experts, weights, views.words, views.halves, grid_of(form, views),
        constants_on(arena.device), bias, out, out.stride(0), offset, stride, panel, items, down.rows, down.cols, top_k,
        triton.next_power_of_2(top_k), form, has_bias, accumulate, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return out
