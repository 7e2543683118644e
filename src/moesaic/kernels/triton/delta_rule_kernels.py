"""The device code of `delta_rule`.

A program of the recurrence keeps some columns of a head's state in registers and goes through its sequence's tokens one
after the other: columns do not depend on each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["conv_kernel", "gated_norm_kernel", "recurrence_kernel"]


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def conv_kernel(
    x,
    columns,
    weight,
    state,
    state_slots,
    positions,
    query_start,
    out,
    x_stride,
    slot_stride,
    width_stride,
    out_stride,
    channels,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program has TOKENS tokens of a sequence and CHANNELS channels; the first of a sequence renews its state.

    The state has the TAPS - 1 inputs before the sequence's first token here. Only the first program reads it, as
    TOKENS is more than that, so that nobody waits for anybody.
    """
    seq, part = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    start, end = tl.load(query_start + seq), tl.load(query_start + seq + 1)
    first = start + part * TOKENS
    if first >= end:
        return
    token = first + tl.arange(0, TOKENS)
    present = (token < end)[:, None] & inside[None, :]
    target = out + token[:, None].to(tl.int64) * out_stride + channel[None, :]
    slot = tl.load(state_slots + seq)
    if slot < 0:  # padding
        tl.store(target, tl.zeros([TOKENS, CHANNELS], tl.float32), mask=present)
        return
    column = tl.load(columns + channel, mask=inside, other=0)
    past_tokens = tl.load(positions + start)
    past = state + slot * slot_stride + channel
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for tap in tl.static_range(TAPS):
        back = TAPS - 1 - tap
        factor = tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0)
        source = token - back
        now = (source >= start) & (token < end)
        value = tl.load(
            x + source[:, None].to(tl.int64) * x_stride + column[None, :],
            mask=now[:, None] & inside[None, :],
            other=0.0,
        )
        before = (source < start) & (source * 0 + past_tokens > 0)
        value += tl.load(
            past[None, :] + (source - start + TAPS - 1)[:, None].to(tl.int64) * width_stride,
            mask=before[:, None] & inside[None, :],
            other=0.0,
        )
        total += factor[None, :] * value
    tl.store(target, _silu(total), mask=present)
    if part == 0:
        tl.debug_barrier()  # all threads have read
        for index in tl.static_range(TAPS - 1):  # in this order: a place is read before a later turn writes it
            last = end - (TAPS - 1) + index
            is_now = column * 0 + last >= start
            kept = tl.load(x + last.to(tl.int64) * x_stride + column, mask=inside & is_now, other=0.0)
            is_past = (column * 0 + last < start) & (column * 0 + past_tokens > 0)
            kept += tl.load(
                past + (last - start + TAPS - 1).to(tl.int64) * width_stride, mask=inside & is_past, other=0.0
            )
            tl.store(past + index * width_stride, kept, mask=inside)


@triton.jit
def recurrence_kernel(
    mixed,
    x,
    beta_columns,
    decay_columns,
    rate,
    step_bias,
    state,
    state_slots,
    positions,
    query_start,
    out,
    mixed_stride,
    x_stride,
    slot_stride,
    out_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A program has a sequence and VALUES columns of the state of one head; GROUP heads share queries and keys."""
    seq, head = tl.program_id(0), tl.program_id(1)
    col = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    row = tl.arange(0, KEY_PAD)
    col_inside, row_inside = col < VALUE_DIM, row < KEY_DIM
    start, end = tl.load(query_start + seq), tl.load(query_start + seq + 1)
    if start >= end:
        return
    slot = tl.load(state_slots + seq)
    target = out + head * VALUE_DIM + col
    if slot < 0:  # padding
        for index in range(0, end - start):
            at = (start.to(tl.int64) + index) * out_stride
            tl.store(target + at, tl.zeros([VALUES], tl.float32), mask=col_inside)
        return
    inside = row_inside[:, None] & col_inside[None, :]
    place = state + slot * slot_stride + head * (KEY_DIM * VALUE_DIM) + row[:, None] * VALUE_DIM + col[None, :]
    past_tokens = tl.load(positions + start)
    memory = tl.load(place, mask=inside & (row[:, None] * 0 + past_tokens > 0), other=0.0)
    key_heads: tl.constexpr = HEADS // GROUP
    queries = mixed + (head // GROUP) * KEY_DIM + row
    keys = queries + key_heads * KEY_DIM
    values = mixed + 2 * key_heads * KEY_DIM + head * VALUE_DIM + col
    betas, decays = x + tl.load(beta_columns + head), x + tl.load(decay_columns + head)
    own_rate, bias = tl.load(rate + head), tl.load(step_bias + head)
    for index in range(0, end - start):
        token = start.to(tl.int64) + index
        at, at_x = token * mixed_stride, token * x_stride
        q = tl.load(queries + at, mask=row_inside, other=0.0)
        k = tl.load(keys + at, mask=row_inside, other=0.0)
        v = tl.load(values + at, mask=col_inside, other=0.0)
        q *= scale / tl.sqrt(tl.sum(q * q, 0) + 1e-6)
        k *= 1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(betas + at_x)))
        time = tl.load(decays + at_x) + bias
        time = tl.where(time > 20.0, time, tl.log(1.0 + tl.exp(tl.minimum(time, 20.0))))  # softplus
        memory *= tl.exp(-own_rate * time)
        change = (v - tl.sum(memory * k[:, None], 0)) * beta
        memory += k[:, None] * change[None, :]
        tl.store(target + token * out_stride, tl.sum(memory * q[:, None], 0), mask=col_inside)
    tl.store(place, memory, mask=inside)


@triton.jit
def gated_norm_kernel(
    x,
    gates,
    gate_columns,
    weight,
    x_stride,
    gate_stride,
    eps,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
):
    """A program has a head of a token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.arange(0, PAD)
    inside = cols < WIDTH
    place = x + token * x_stride + head * WIDTH + cols
    values = tl.load(place, mask=inside, other=0.0)
    gate = tl.load(gates + token * gate_stride + tl.load(gate_columns + head) + cols, mask=inside, other=0.0)
    values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    values *= tl.load(weight + cols, mask=inside, other=0.0)
    tl.store(place, values * _silu(gate), mask=inside)
