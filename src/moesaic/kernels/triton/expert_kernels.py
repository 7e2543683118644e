"""Kernels of routed experts in slots of an arena, for few tokens, and what those for many (`grouped_kernels`) share.

They know shapes and the formats' functions, no model.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.few_products import lane_products, panel_products, zeros

__all__ = ["activate", "decode_down_kernel", "decode_up_kernel", "operand_place"]


@triton.jit
def _tanh(x) -> Any:
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(gate, up, alpha, limit, KIND: tl.constexpr) -> Any:
    """`f(gate) * up`; callers without a gate give the product of up as gate and ones as up."""
    if KIND == "silu":
        out = gate * tl.sigmoid(gate) * up
    elif KIND == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":
        out = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    elif KIND == "relu":
        out = tl.maximum(gate, 0.0) * up
    elif KIND == "relu2":
        positive = tl.maximum(gate, 0.0)
        out = positive * positive * up
    else:
        tl.static_assert(KIND == "swiglu_oai")
        gate = tl.minimum(gate, limit)
        out = gate * tl.sigmoid(alpha * gate) * (tl.minimum(tl.maximum(up, -limit), limit) + 1.0)
    return out


@triton.jit
def lane_place(k, F: tl.constexpr) -> Any:
    """Where `lanes` has column k."""
    L: tl.constexpr = F.lanes
    piece: tl.constexpr = L.steps * L.width
    apart: tl.constexpr = L.interleave * piece
    whole: tl.constexpr = L.interleave * L.item
    n = k // whole * L.interleave + k % apart // piece
    e = k % whole // apart * piece + k % piece
    return n // 8 * ((L.item + L.num_sums) * 8) + e // 4 * 32 + n % 8 * 4 + e % 4


@triton.jit
def operand_place(k, place, num_places, F: tl.constexpr) -> Any:
    """Where `operands` of num_places tokens has column k of token `place`: int64."""
    piece: tl.constexpr = F.steps * F.width
    apart: tl.constexpr = F.interleave * piece
    whole: tl.constexpr = F.interleave * F.item
    n = k // whole * F.interleave + k % apart // piece
    p, s = k % whole // apart, k % piece // F.width
    chunk = s // F.chunk_steps * (F.planes // F.chunk_planes) + p // F.chunk_planes
    in_chunk = (s % F.chunk_steps * F.chunk_planes + p % F.chunk_planes) * F.width + k % F.width
    row = (n // 16 * (F.item // 8) + chunk).to(tl.int64) * num_places + place
    return row * 128 + (n % 16 * 8 + in_chunk)


@triton.jit
def decode_up_kernel(
    gate_x,
    up_x,
    gate_stride,
    up_stride,
    slots,
    experts,
    words,
    halves,
    gate_grid,
    up_grid,
    constants,
    gate_bias,
    up_bias,
    inner,
    inner_stride,
    gate_units,
    up_units,
    gate_stride_units,
    up_stride_units,
    gate_panel_units,
    up_panel_units,
    gate_items,
    up_items,
    rows,
    cols,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    KIND: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Gate, up and activation of 16 rows for one pair of a token and an expert, as `lanes` of down's format."""
    is_same: tl.constexpr = GATE is not None and GATE.name == UP.name
    index, pair = tl.program_id(0), tl.program_id(1)
    here = tl.load(slots + pair)
    if here >= 0:
        token = pair // TOP_K
        r = index * 16 + tl.arange(0, 16)
        slot = here.to(tl.int64)
        up_panel = slot * up_stride_units + up_units + index.to(tl.int64) * up_panel_units
        gate_panel = slot * gate_stride_units + gate_units + index.to(tl.int64) * gate_panel_units
        lane = tl.arange(0, ITEMS)[:, None]
        gate = tl.zeros((16,), tl.float32)
        if is_same:  # half of the lanes have each, so that all loads are under way at a time
            half: tl.constexpr = ITEMS // 2
            panel = tl.where(lane < half, gate_panel, up_panel)
            totals = panel_products(
                up_x + token * up_stride, 0, words, halves, up_grid, constants, panel, lane % half, cols, up_items, 0,
                tl.cdiv(up_items, half), UP, 1, half,
            )  # fmt: skip
            both = tl.sum(tl.reshape(totals[0], (2, half, 16)), axis=1)
            gate, up = tl.split(tl.permute(both, (1, 0)))
        else:
            last = tl.cdiv(up_items, ITEMS)
            totals = panel_products(
                up_x + token * up_stride, 0, words, halves, up_grid, constants, up_panel, lane, cols, up_items, 0,
                last, UP, 1, ITEMS,
            )  # fmt: skip
            up = tl.sum(totals[0], axis=0)
            if GATE is not None:
                last = tl.cdiv(gate_items, ITEMS)
                totals = panel_products(
                    gate_x + token * gate_stride, 0, words, halves, gate_grid, constants, gate_panel, lane, cols,
                    gate_items, 0, last, GATE, 1, ITEMS,
                )  # fmt: skip
                gate = tl.sum(totals[0], axis=0)
        if UP_BIAS:
            up += tl.load(up_bias + tl.load(experts + pair).to(tl.int64) * rows + r, mask=r < rows, other=0.0)
        if GATE_BIAS:
            gate += tl.load(gate_bias + tl.load(experts + pair).to(tl.int64) * rows + r, mask=r < rows, other=0.0)
        if GATE is None:
            result = activate(up, 1.0, alpha, limit, KIND)
        else:
            result = activate(gate, up, alpha, limit, KIND)
        # Padded rows are columns of the last item of float formats.
        tl.store(inner + pair.to(tl.int64) * inner_stride + lane_place(r, DOWN), tl.where(r < rows, result, 0.0))


@triton.jit
def decode_down_kernel(
    inner,
    inner_stride,
    slots,
    experts,
    weights,
    words,
    halves,
    grid,
    constants,
    bias,
    out,
    out_stride,
    down_units,
    stride_units,
    panel_units,
    num_items,
    rows,
    cols,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Weighted sum over a token's experts of 16 rows of down. Lanes share out the items of all its experts in slots."""
    index, token = tl.program_id(0), tl.program_id(1)
    r = index * 16 + tl.arange(0, 16)
    lane = tl.arange(0, ITEMS)[:, None]
    k = tl.arange(0, PADDED_K)
    own = tl.load(slots + token * TOP_K + k, mask=k < TOP_K, other=-1)
    is_there = own >= 0
    rank = tl.cumsum(is_there.to(tl.int32), 0) - 1
    count = tl.sum(is_there.to(tl.int32), 0)
    w_all = tl.load(weights + token * TOP_K + k, mask=is_there, other=0.0)
    totals = zeros(1, ITEMS, 16)
    for iteration in range(0, tl.cdiv(count * num_items, ITEMS)):
        at = iteration * ITEMS + lane
        nth, item = at // num_items, at % num_items
        is_own = is_there[None, :] & (rank[None, :] == nth)
        position = tl.sum(tl.where(is_own, k[None, :], 0), 1)[:, None]
        slot = tl.sum(tl.where(is_own, own[None, :], 0), 1)[:, None]
        w = tl.sum(tl.where(is_own, w_all[None, :], 0.0), 1)[:, None]
        x = inner + (token * TOP_K + position).to(tl.int64) * inner_stride
        panel = slot.to(tl.int64) * stride_units + down_units + index.to(tl.int64) * panel_units
        added = lane_products(zeros(1, ITEMS, 16), x, 0, words, halves, grid, constants, panel, item, cols, F, 1, False)
        # Lanes behind the last expert read the first slot and whatever activations there are.
        totals = (totals[0] + tl.where(nth < count, added[0] * w, 0.0),)
    result = tl.sum(totals[0], axis=0)
    if BIAS:
        for j in range(0, TOP_K):
            if tl.load(slots + token * TOP_K + j) >= 0:
                e = tl.load(experts + token * TOP_K + j).to(tl.int64)
                scaled = tl.load(bias + e * rows + r, mask=r < rows, other=0.0)
                result += tl.load(weights + token * TOP_K + j) * scaled
    target = out + token.to(tl.int64) * out_stride + r
    if ADDS:
        result += tl.load(target, mask=r < rows, other=0.0)
    tl.store(target, result, mask=r < rows)
