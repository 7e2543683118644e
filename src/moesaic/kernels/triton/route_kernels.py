"""The device code of `route`.

A program chooses for one token. What it chooses among gets int32 numbers that sort as values do (a NaN first); each
choice is their maximum and then the lowest index that has it, for both of which cards have one instruction per warp.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.routing import GROUP_SCORES, ROUTE_SCORES

__all__ = ["logits_kernel", "route_kernel", "row_logits_kernel"]

_SOFTMAX: tl.constexpr = tl.constexpr(ROUTE_SCORES["softmax"])
_SIGMOID: tl.constexpr = tl.constexpr(ROUTE_SCORES["sigmoid"])
_SOFTMAX_OF_CHOSEN: tl.constexpr = tl.constexpr(ROUTE_SCORES["softmax_of_chosen"])
_NO_LIMIT: tl.constexpr = tl.constexpr(GROUP_SCORES["none"])
_SUM_OF_TWO: tl.constexpr = tl.constexpr(GROUP_SCORES["sum_of_two"])
_MAXIMUM: tl.constexpr = tl.constexpr(GROUP_SCORES["maximum"])
_LEAST: tl.constexpr = tl.constexpr(-(2**31))  # what may not be chosen, below minus infinity
_LOW_BITS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_FEW_GROUPS: tl.constexpr = tl.constexpr(32)  # are compared each with each


@triton.jit
def _order(values, eligible):
    """int32 numbers that sort as values do. Zeros of both signs are equal, and so are all NaNs, above all others."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ _LOW_BITS, bits)
    order = tl.where(values != values, _LOW_BITS, order)
    return tl.where(eligible, order, _LEAST)


@triton.jit
def _value(order):
    """What had this place in the order."""
    return tl.where(order < 0, order ^ _LOW_BITS, order).to(tl.float32, bitcast=True)


@triton.jit
def _open_groups(order, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOPK_GROUPS: tl.constexpr, LIMIT: tl.constexpr):
    """Which groups' experts may be chosen: int1 [groups], of what has the order [groups, experts of a group]."""
    PAD: tl.constexpr = order.shape[0]
    group = tl.arange(0, PAD)
    best = tl.max(order, 1)
    worth = _value(best)
    if LIMIT == _SUM_OF_TWO and SIZE > 1:
        is_best = order == best[:, None]
        second = tl.max(tl.where(is_best, _LEAST, order), 1)
        worth += _value(tl.where(tl.sum(is_best.to(tl.int32), 1) > 1, best, second))
    place = _order(worth, group < GROUPS)
    if PAD <= _FEW_GROUPS:
        is_less = (place[None, :] == place[:, None]) & (group[None, :] < group[:, None])
        return tl.sum(((place[None, :] > place[:, None]) | is_less).to(tl.int32), 1) < TOPK_GROUPS
    is_open = group < 0
    for _ in tl.static_range(TOPK_GROUPS):
        chosen = group == tl.min(tl.where(place == tl.max(place, 0), group, PAD), 0)
        is_open = is_open | chosen
        place = tl.where(chosen, _LEAST, place)
    return is_open


@triton.jit
def _score(logits, largest, total, SCORE: tl.constexpr):
    """Scores of logits, which for a softmax are those whose largest and whose sum are given."""
    if SCORE == _SOFTMAX:
        return tl.exp(logits - largest) / total
    if SCORE == _SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    return logits


@triton.jit
def _ask(requested, arrivals, number, num_programs, ALONE: tl.constexpr):
    """Let the CPU see a request when all programs have written their part of it."""
    tl.debug_barrier()  # all threads' stores come before what one of them releases
    if ALONE:
        tl.atomic_xchg(requested, number, sem="release", scope="sys")
    else:
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="sys") == num_programs - 1:
            tl.store(arrivals, 0)
            tl.debug_barrier()
            tl.atomic_xchg(requested, number, sem="release", scope="sys")


@triton.jit(do_not_specialize=["position"])
def route_kernel(
    logits,
    bias,
    slot_of_expert,
    slot_mapping,
    weights,
    experts,
    slots,
    misses,
    box_chosen,
    box_experts,
    box_weights,
    requested,
    arrivals,
    base,
    position,
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
    ASKS: tl.constexpr,
    ALONE: tl.constexpr,
):
    """See `route.route`. What comes from memory is asked for at once; experts lie group by group, each padded."""
    token = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    index = flat // SIZE_PAD * SIZE + flat % SIZE_PAD
    inside = (flat // SIZE_PAD < GROUPS) & (flat % SIZE_PAD < SIZE)
    scores = tl.load(logits + token * logits_stride + index, mask=inside, other=float("-inf"))
    number = token * 0
    if ASKS:
        number = tl.load(base) + position + 1
    choice = scores
    if BIASED:
        choice = tl.load(bias + index, mask=inside, other=0.0)
    is_real = True
    if PADDED:
        is_real = tl.load(slot_mapping + token) >= 0
    warm = flat * 0
    if LOOKS_UP:
        warm = tl.load(slot_of_expert + index, mask=inside, other=0)

    largest, total = 0.0, 1.0
    if SCORE == _SOFTMAX:
        largest = tl.max(scores, 0)
        total = tl.sum(tl.exp(scores - largest), 0)
    scores = _score(scores, largest, total, SCORE)
    if BIASED:
        choice += scores
    else:
        choice = scores
    order = _order(choice, inside)
    if LIMIT != _NO_LIMIT:
        by_group = tl.reshape(order, (GROUPS_PAD, SIZE_PAD))
        is_open = _open_groups(by_group, GROUPS, SIZE, TOPK_GROUPS, LIMIT)
        is_open = tl.reshape(tl.broadcast_to(is_open[:, None], (GROUPS_PAD, SIZE_PAD)), (GROUPS_PAD * SIZE_PAD,))
        closed = 0.0 if LIMIT == _MAXIMUM else float("-inf")
        order = tl.where(is_open, order, _order(tl.zeros_like(choice) + closed, inside))

    place = tl.arange(0, TOP_K_PAD)
    chosen_order = tl.full([TOP_K_PAD], _LEAST, tl.int32)
    chosen = tl.zeros([TOP_K_PAD], tl.int32)
    for turn in tl.static_range(TOP_K):
        best = tl.max(order, 0)
        expert = tl.min(tl.where(order == best, index, _LOW_BITS), 0)
        order = tl.where(index == expert, _LEAST, order)
        chosen_order = tl.where(place == turn, best, chosen_order)
        chosen = tl.where(place == turn, expert, chosen)

    target, in_list = token * TOP_K + place, place < TOP_K
    if LIMIT == _MAXIMUM or (LIMIT == _NO_LIMIT and not BIASED):
        picked = _value(chosen_order)  # an expert of a closed group, chosen for want of others, weighs 0
    else:
        picked = _score(tl.load(logits + token * logits_stride + chosen, mask=in_list), largest, total, SCORE)
    picked = tl.where(in_list, picked, float("-inf"))
    if SCORE == _SOFTMAX_OF_CHOSEN:
        picked = tl.exp(picked - tl.max(picked, 0))
        picked = picked / tl.sum(picked, 0)
    factor = scale
    if NORMALIZE:
        sums = tl.sum(tl.where(in_list, picked, 0.0), 0) + sum_offset
        factor = scale / tl.where(sums < sum_minimum, sum_minimum, sums)
    picked *= factor
    numbers = chosen.to(tl.int64)
    if PADDED:
        picked, numbers = tl.where(is_real, picked, 0.0), tl.where(is_real, numbers, -1)
    miss = numbers
    tl.store(weights + target, picked, mask=in_list)
    tl.store(experts + target, numbers, mask=in_list)
    if LOOKS_UP:
        # The table's row was read above, so that this finds it near; no slot is less than -1.
        beside = (tl.min(warm, 0) < -1).to(tl.int32)
        slot = tl.load(slot_of_expert + chosen + beside, mask=in_list, other=-1)
        miss = tl.where(slot < 0, numbers, -1)
        if PADDED:
            slot = tl.where(is_real, slot, -1)
        tl.store(slots + target, slot, mask=in_list)
        tl.store(misses + target, miss, mask=in_list)
    if ASKS:
        tl.store(box_chosen + target, numbers, mask=in_list)
        tl.store(box_experts + target, miss, mask=in_list)
        tl.store(box_weights + target, picked, mask=in_list)
        _ask(requested, arrivals, number, tl.num_programs(0), ALONE)


@triton.jit
def _send(x, box_hidden, num_sent, x_stride, HIDDEN: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr):
    """A program writes its PART of each of `num_sent` rows into the mailbox."""
    col = tl.program_id(0) * PART + tl.arange(0, PART)
    for token in tl.static_range(TOKENS):
        inside = (col < HIDDEN) & (token + col * 0 < num_sent)
        row = tl.load(x + token * x_stride + col, mask=inside, other=0.0)
        tl.store(box_hidden + token * HIDDEN + col, row, mask=inside)


@triton.jit(do_not_specialize=["num_sent"])
def row_logits_kernel(
    x,
    weight,
    bias,
    out,
    box_hidden,
    num_sent,
    num_tokens,
    x_stride,
    num_experts,
    HIDDEN: tl.constexpr,
    PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    BIASED: tl.constexpr,
):
    """ROWS whole rows of a weight times a few tokens, products of float32 summed in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, PAD)
    inside = cols < HIDDEN
    w = tl.load(
        weight + row[:, None].to(tl.int64) * HIDDEN + cols[None, :],
        mask=(row < num_experts)[:, None] & inside[None, :],
        other=0.0,
    )
    values = ()
    for token in tl.static_range(TOKENS):
        is_there = inside & (token + cols * 0 < num_tokens)
        values = values + (tl.load(x + token * x_stride + cols, mask=is_there, other=0.0),)
    _send(x, box_hidden, num_sent, x_stride, HIDDEN, TOKENS, PART)
    tl.debug_barrier()  # or the compiler puts some of these loads off until others are there
    for token in tl.static_range(TOKENS):
        result = tl.sum(w * values[token][None, :], 1)
        if BIASED:
            result += tl.load(bias + row, mask=row < num_experts, other=0.0)
        tl.store(out + token * num_experts + row, result, mask=(row < num_experts) & (token + row * 0 < num_tokens))


@triton.jit(do_not_specialize=["num_sent"])
def logits_kernel(
    x,
    weight,
    bias,
    out,
    box_hidden,
    num_sent,
    num_tokens,
    x_stride,
    num_experts,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    BIASED: tl.constexpr,
):
    """As `row_logits_kernel`, for more tokens or longer rows: piece by piece."""
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
    _send(x, box_hidden, num_sent, x_stride, HIDDEN, TOKENS, PART)
    result = tl.sum(sums, 2)
    if BIASED:
        result += tl.load(bias + row, mask=row < num_experts, other=0.0)[None, :]
    tl.store(
        out + token[:, None] * num_experts + row[None, :],
        result,
        mask=(token < num_tokens)[:, None] & (row < num_experts)[None, :],
    )
