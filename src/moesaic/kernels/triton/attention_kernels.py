"""The device code of `attention`: one kernel for grouped-query and latent attention, decode and prefill.

A program serves a tile of rows, a row being a query token and a head, of one sequence and the keys' head that these
heads share; it walks its share of the keys with a running softmax (Milakov and Gimelshein, arXiv 1805.02867). With
several shares each leaves its result and the logarithm of its weight, which `merge_kernels` add up (flash decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.triton._dot import dot

__all__ = ["attend_kernel"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _blocks(table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the positions from `start`, a multiple of BLOCK_N, on: one number if they share it, else one each."""
    index = start if BLOCK_SIZE % BLOCK_N == 0 else start + tl.arange(0, BLOCK_N)
    return tl.load(table + index // BLOCK_SIZE, mask=index < end, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["table_row", "lse_split", "num_splits"])
def attend_kernel(
    q,
    q_rope,
    keys,
    values,
    tables,
    seq_lens,
    query_start,
    sinks,
    out,
    lse,
    scale,
    softcap,
    window,
    q_token,
    q_head,
    rope_token,
    rope_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    table_row,
    out_split,
    out_token,
    out_head,
    lse_split,
    num_splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """See `attention.paged_attention`. With ROPE_DIM keys have a second part; LATENT: the first is the value."""
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    seq = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    first_token = tl.load(query_start + seq)
    num_new = tl.load(query_start + seq + 1) - first_token
    num_past = tl.load(seq_lens + seq) - num_new  # negative in padding: then nothing is seen
    if row_block * BLOCK_M >= num_new * GROUP:
        return
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = row < num_new * GROUP
    position = num_past + row // GROUP
    head = kv_head * GROUP + row % GROUP
    token = (first_token + row // GROUP).to(tl.int64)

    last_row = tl.minimum(row_block * BLOCK_M + BLOCK_M, num_new * GROUP) - 1
    end = tl.maximum(num_past + last_row // GROUP + 1, 0)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(num_past + row_block * BLOCK_M // GROUP + 1 - window, 0) // BLOCK_N * BLOCK_N
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), num_splits) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(end, begin + share)
        own_log = lse + split.to(tl.int64) * lse_split + token * (KV_HEADS * GROUP) + head
        if begin >= end:
            tl.store(own_log, float("-inf"), mask=alive)
            return

    key_dims = tl.arange(0, KEY_PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    operand = keys.dtype.element_ty
    query = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + key_dims[None, :],
        mask=alive[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    ).to(operand)
    if ROPE_DIM > 0:
        rope_dims = tl.arange(0, ROPE_PAD)
        rope_query = tl.load(
            q_rope + token[:, None] * rope_token + head[:, None] * rope_head + rope_dims[None, :],
            mask=alive[:, None] & (rope_dims < ROPE_DIM)[None, :],
            other=0.0,
        ).to(operand)

    table = tables + seq.to(tl.int64) * table_row
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    blocks = _blocks(table, begin, end, BLOCK_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        inside = index < end
        slots = blocks * key_block + (index % BLOCK_SIZE) * key_slot + kv_head * key_head
        key = tl.load(
            keys + slots[:, None] + key_dims[None, :],
            mask=inside[:, None] & (key_dims < KEY_DIM)[None, :],
            other=0.0,
        )
        scores = dot(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if ROPE_DIM > 0:
            rope_key = tl.load(
                keys + slots[:, None] + KEY_DIM + rope_dims[None, :],
                mask=inside[:, None] & (rope_dims < ROPE_DIM)[None, :],
                other=0.0,
            )
            scores = dot(rope_query, tl.trans(rope_key), scores)
        scores *= scale
        if SOFTCAP:  # softcap * tanh(scores / softcap); exp of a large number is infinite, and tanh then 1
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 / softcap * scores) + 1.0))
        visible = inside[None, :] & (index[None, :] <= position[:, None])
        if WINDOWED:
            visible &= index[None, :] > position[:, None] - window
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # of rows that have seen nothing yet
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(shares, 1)
        highest = new_highest
        if LATENT:
            value = key
        else:
            value_slots = blocks * value_block + (index % BLOCK_SIZE) * value_slot + kv_head * value_head
            value = tl.load(
                values + value_slots[:, None] + value_dims[None, :],
                mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
        sums = dot(shares.to(operand), value, sums * fade[:, None])
        blocks = _blocks(table, start + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)  # a turn ahead: keys must not wait for them

    if SINKS and not IS_SPLIT:
        sink = tl.load(sinks + head) * _LOG2_E
        base = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - base) + tl.exp2(sink - base)
        sums *= tl.exp2(highest - base)[:, None]
    seen = total > 0.0
    written = alive
    if IS_SPLIT:
        log = tl.where(seen, highest + tl.log2(total), float("-inf"))
        tl.store(own_log, log, mask=alive)
        written = alive & seen  # what has no weight is not read
    result = sums * tl.where(seen, 1.0 / total, 0.0)[:, None]
    tl.store(
        out
        + split.to(tl.int64) * out_split
        + token[:, None] * out_token
        + head[:, None] * out_head
        + value_dims[None, :],
        result,
        mask=written[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
