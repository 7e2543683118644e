"""The device code of `route`.

A program chooses for one token. What it chooses among gets keys, int64 numbers that sort by value (a NaN first) and
then by the lower index, so that each choice is one maximum, the same on every card.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.routing import GROUP_SCORES, ROUTE_SCORES

__all__ = ["logits_kernel", "route_kernel"]

_SOFTMAX: tl.constexpr = tl.constexpr(ROUTE_SCORES["softmax"])
_SIGMOID: tl.constexpr = tl.constexpr(ROUTE_SCORES["sigmoid"])
_SOFTMAX_OF_CHOSEN: tl.constexpr = tl.constexpr(ROUTE_SCORES["softmax_of_chosen"])
_NO_LIMIT: tl.constexpr = tl.constexpr(GROUP_SCORES["none"])
_SUM_OF_TWO: tl.constexpr = tl.constexpr(GROUP_SCORES["sum_of_two"])
_MAXIMUM: tl.constexpr = tl.constexpr(GROUP_SCORES["maximum"])
_NOTHING: tl.constexpr = tl.constexpr(-(2**63))  # the key of what may not be chosen
_LOW_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(values, index, eligible):
    """Sort by value, then by the lower index. Zeros of both signs are equal, and so are all NaNs."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ _LOW_BITS, bits)
    order = tl.where(values != values, _LOW_BITS, order)
    return tl.where(eligible, order.to(tl.int64) * 4294967296 + (index ^ _LOW_BITS), _NOTHING)


@triton.jit
def _index_of(key):
    return (key & _LOW_BITS).to(tl.int32) ^ _LOW_BITS


@triton.jit
def _open_groups(
    choice,
    inside,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Which groups' experts may be chosen: int1 [GROUPS_PAD]."""
    group, member = tl.arange(0, GROUPS_PAD), tl.arange(0, SIZE_PAD)
    keys = _keys(choice, member[None, :], inside)
    best = _index_of(tl.max(keys, 1))
    is_best = member[None, :] == best[:, None]
    worth = tl.sum(tl.where(is_best, choice, 0.0), 1)
    if LIMIT == _SUM_OF_TWO and SIZE > 1:
        second = _index_of(tl.max(tl.where(is_best, _NOTHING, keys), 1))
        worth += tl.sum(tl.where(member[None, :] == second[:, None], choice, 0.0), 1)
    keys = _keys(worth, group, group < GROUPS)
    is_open = group < 0
    for _ in tl.static_range(TOPK_GROUPS):
        chosen = group == _index_of(tl.max(keys, 0))
        is_open = is_open | chosen
        keys = tl.where(chosen, _NOTHING, keys)
    return is_open


@triton.jit
def route_kernel(
    logits,
    bias,
    slot_of_expert,
    slot_mapping,
    weights,
    experts,
    slots,
    misses,
    logits_stride,
    sum_offset,
    sum_minimum,
    scale,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    SCORE: tl.constexpr,
    LIMIT: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOOKS_UP: tl.constexpr,
    PADDED: tl.constexpr,
):
    """See `route.route`. Experts are a tile [groups, experts of a group]."""
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS_PAD), tl.arange(0, SIZE_PAD)
    index = group[:, None] * SIZE + member[None, :]
    inside = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    scores = tl.load(logits + token * logits_stride + index, mask=inside, other=float("-inf"))
    if SCORE == _SOFTMAX:
        scores = tl.exp(scores - tl.max(tl.max(scores, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    if SCORE == _SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-scores))
    choice = scores
    if BIASED:
        choice += tl.load(bias + index, mask=inside, other=0.0)
    source = scores
    if LIMIT != _NO_LIMIT:
        is_open = _open_groups(choice, inside, GROUPS, GROUPS_PAD, SIZE, SIZE_PAD, TOPK_GROUPS, LIMIT)
        choice = tl.where(is_open[:, None], choice, 0.0 if LIMIT == _MAXIMUM else float("-inf"))
        if LIMIT == _MAXIMUM:  # an expert of a closed group, chosen for want of others, weighs 0
            source = choice

    place = tl.arange(0, TOP_K_PAD)
    chosen_weights = tl.full([TOP_K_PAD], float("-inf"), tl.float32)
    chosen_experts = tl.zeros([TOP_K_PAD], tl.int32)
    keys = _keys(choice, index, inside)
    for turn in tl.static_range(TOP_K):
        expert = _index_of(tl.max(tl.max(keys, 1), 0))
        is_chosen = index == expert
        weight = tl.sum(tl.sum(tl.where(is_chosen & inside, source, 0.0), 1), 0)
        chosen_weights = tl.where(place == turn, weight, chosen_weights)
        chosen_experts = tl.where(place == turn, expert, chosen_experts)
        keys = tl.where(is_chosen, _NOTHING, keys)
    if SCORE == _SOFTMAX_OF_CHOSEN:
        chosen_weights = tl.exp(chosen_weights - tl.max(chosen_weights, 0))
        chosen_weights = chosen_weights / tl.sum(chosen_weights, 0)
    factor = scale
    if NORMALIZE:
        total = tl.sum(tl.where(place < TOP_K, chosen_weights, 0.0), 0) + sum_offset
        factor = scale / tl.where(total < sum_minimum, sum_minimum, total)
    chosen_weights *= factor

    target, in_list = token * TOP_K + place, place < TOP_K
    is_real = True
    if PADDED:
        is_real = tl.load(slot_mapping + token) >= 0
        chosen_weights = tl.where(is_real, chosen_weights, 0.0)
    tl.store(weights + target, chosen_weights, mask=in_list)
    tl.store(experts + target, chosen_experts.to(tl.int64), mask=in_list)
    if LOOKS_UP:
        slot = tl.load(slot_of_expert + chosen_experts, mask=in_list, other=-1)
        miss = tl.where(slot < 0, chosen_experts.to(tl.int64), -1)
        if PADDED:
            slot, miss = tl.where(is_real, slot, -1), tl.where(is_real, miss, -1)
        tl.store(slots + target, slot, mask=in_list)
        tl.store(misses + target, miss, mask=in_list)


@triton.jit
def logits_kernel(
    x,
    weight,
    bias,
    out,
    num_tokens,
    x_stride,
    num_experts,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BIASED: tl.constexpr,
):
    """ROWS rows of a weight times a few tokens, products of float32 summed in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    cols = tl.arange(0, CHUNK)
    sums = tl.zeros([TOKENS, ROWS, CHUNK], tl.float32)
    for first in tl.static_range(0, HIDDEN, CHUNK):  # unrolled, so that all loads are under way at once
        inside = first + cols < HIDDEN
        w = tl.load(
            weight + row[:, None].to(tl.int64) * HIDDEN + first + cols[None, :],
            mask=(row < num_experts)[:, None] & inside[None, :],
            other=0.0,
        )
        values = tl.load(
            x + token[:, None].to(tl.int64) * x_stride + first + cols[None, :],
            mask=(token < num_tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        sums += values[:, None, :] * w[None, :, :]
    result = tl.sum(sums, 2)
    if BIASED:
        result += tl.load(bias + row, mask=row < num_experts, other=0.0)[None, :]
    tl.store(
        out + token[:, None] * num_experts + row[None, :],
        result,
        mask=(token < num_tokens)[:, None] & (row < num_experts)[None, :],
    )
