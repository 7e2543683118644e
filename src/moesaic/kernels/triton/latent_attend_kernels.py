"""Device code of absorbed latent attention of few tokens: two ways to cut the same grid, by how long a sequence is.

A short sequence is bound by what a program does before and behind its few keys, so rows are cut finer than for a long
one, of which each key should be read for as many rows as a program has registers for. Lengths are known to the device
alone, so the program decides. Otherwise it is `attention_kernels.attend_kernel`, for one head of keys that are values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.triton._dot import dot

__all__ = ["latent_attend_kernel"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _loaded(pointers, alive, dims, DIM: tl.constexpr, PAD: tl.constexpr):
    """Rows of DIM numbers where they are `alive`, zeros elsewhere."""
    if DIM == PAD:
        return tl.load(pointers, mask=alive[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=alive[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _attend(
    q_latent,
    q_rope,
    cache,
    table,
    out,
    lse,
    scale,
    first_row,
    num_rows,
    num_past,
    begin,
    end,
    cache_block,
    HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    CACHE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows from `first_row` on with the keys from `begin`, a multiple of BLOCK_N, to `end`; pointers of a sequence."""
    row = first_row + tl.arange(0, BLOCK_M)
    alive = row < num_rows
    position = num_past + row // HEADS
    dims, rope_dims = tl.arange(0, LATENT_PAD), tl.arange(0, ROPE_PAD)
    operand = cache.dtype.element_ty
    query = _loaded(q_latent + row[:, None] * LATENT_DIM + dims[None, :], alive, dims, LATENT_DIM, LATENT_PAD)
    query = query.to(operand)
    rope_query = _loaded(q_rope + row[:, None] * ROPE_DIM + rope_dims[None, :], alive, rope_dims, ROPE_DIM, ROPE_PAD)
    rope_query = rope_query.to(operand)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, LATENT_PAD], tl.float32)
    near = tl.arange(0, BLOCK_N)
    key_at = near[:, None] * CACHE_SLOT + dims[None, :]
    rope_at = near[:, None] * CACHE_SLOT + LATENT_DIM + rope_dims[None, :]
    block = tl.load(table + begin // BLOCK_SIZE).to(tl.int64)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        source = cache + (block * cache_block + start % BLOCK_SIZE * CACHE_SLOT)
        inside = start + near < end
        key = _loaded(source + key_at, inside, dims, LATENT_DIM, LATENT_PAD)
        rope_key = _loaded(source + rope_at, inside, rope_dims, ROPE_DIM, ROPE_PAD)
        scores = dot(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        scores = dot(rope_query, tl.trans(rope_key), scores)
        visible = start + near[None, :] <= tl.minimum(position, end - 1)[:, None]
        scores = tl.where(visible, scores * (scale * _LOG2_E), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # of rows that have seen nothing yet
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(shares, 1)
        highest = new_highest
        sums = dot(shares.to(operand), key, sums * fade[:, None])
        # A turn ahead: keys must not wait for where they are.
        block = tl.load(table + (start + BLOCK_N) // BLOCK_SIZE, mask=start + BLOCK_N < end, other=0).to(tl.int64)
    seen = total > 0.0
    tl.store(lse + row, tl.where(seen, highest + tl.log2(total), float("-inf")), mask=alive)
    result = sums * tl.where(seen, 1.0 / total, 0.0)[:, None]
    written = (alive & seen)[:, None] & (dims < LATENT_DIM)[None, :]
    tl.store(out + row[:, None] * LATENT_DIM + dims[None, :], result, mask=written)


@triton.jit(do_not_specialize=["table_row", "num_tokens", "num_splits", "few"])
def latent_attend_kernel(
    q_latent,
    q_rope,
    cache,
    tables,
    seq_lens,
    query_start,
    parts,
    lse,
    scale,
    cache_block,
    table_row,
    num_tokens,
    num_splits,
    few,
    HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    CACHE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FEW_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of rows of a sequence and a share of the keys that these see; see `attention.latent_attention_parts`.

    With `few` keys and fewer, tiles have FEW_M rows and there are fewer shares: the others have seen nothing.
    """
    cuts: tl.constexpr = BLOCK_M // FEW_M
    seq, split = tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_start + seq)
    num_new = tl.load(query_start + seq + 1) - first_token
    num_past = tl.load(seq_lens + seq) - num_new  # negative in padding: then nothing is seen
    num_rows = num_new * HEADS
    first_row = tl.program_id(0) * BLOCK_M
    if first_row < num_rows:
        end = tl.maximum(num_past + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // HEADS + 1, 0)
        at = first_token.to(tl.int64) * HEADS
        stride = tl.cast(num_tokens, tl.int64) * HEADS
        table = tables + seq.to(tl.int64) * table_row
        q_latent += at * LATENT_DIM
        q_rope += at * ROPE_DIM
        lse += at
        parts += at * LATENT_DIM
        if end <= few:
            first_row += split % cuts * FEW_M
            split = split // cuts
            shares = num_splits // cuts
            share = tl.cdiv(tl.cdiv(end, BLOCK_N), shares) * BLOCK_N
            begin = split * share
            row = first_row + tl.arange(0, FEW_M)
            for other in range(split + shares, num_splits, shares):
                tl.store(lse + other * stride + row, float("-inf"), mask=row < num_rows)
            if (begin < end) & (first_row < num_rows):
                _attend(
                    q_latent, q_rope, cache, table, parts + split * stride * LATENT_DIM, lse + split * stride, scale,
                    first_row, num_rows, num_past, begin, tl.minimum(end, begin + share), cache_block, HEADS,
                    LATENT_DIM, LATENT_PAD, ROPE_DIM, ROPE_PAD, CACHE_SLOT, BLOCK_SIZE, FEW_M, BLOCK_N, STAGES,
                )  # fmt: skip
            else:
                tl.store(lse + split * stride + row, float("-inf"), mask=row < num_rows)
        else:
            share = tl.cdiv(tl.cdiv(end, BLOCK_N), num_splits) * BLOCK_N
            begin = split * share
            if begin < end:
                _attend(
                    q_latent, q_rope, cache, table, parts + split * stride * LATENT_DIM, lse + split * stride, scale,
                    first_row, num_rows, num_past, begin, tl.minimum(end, begin + share), cache_block, HEADS,
                    LATENT_DIM, LATENT_PAD, ROPE_DIM, ROPE_PAD, CACHE_SLOT, BLOCK_SIZE, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
            else:
                row = first_row + tl.arange(0, BLOCK_M)
                tl.store(lse + split * stride + row, float("-inf"), mask=row < num_rows)
