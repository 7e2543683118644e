"""Device code that adds up what shares of the keys left, and ways to the product that comes next.

A share leaves a row of means per token and head and the base-2 logarithm of its weight; those that saw no key leave
-inf and anything (flash decoding).
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton.expert_kernels import lane_place
from moesaic.kernels.triton.thirds import item_floats, store_thirds, third_place

__all__ = ["merge_kernel", "store_columns"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_FIRST: tl.constexpr = tl.constexpr(2)  # shares that are read before it is known whether they hold anything


@triton.jit
def _sums(values, first, F: tl.constexpr, SUMS: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr) -> Any:
    """Of columns from `first` on, SUMS of an item: which item, which sum of it, [n], and the sums, [TOKENS, n]."""
    # A sum is of planes that follow each other, or of a part of the steps of one.
    apart: tl.constexpr = min(SUMS, F.planes)
    parts: tl.constexpr = SUMS // apart
    rows_of: tl.constexpr = TOKENS * (COLS // (F.interleave * F.item)) * apart
    shape: tl.constexpr = (rows_of, F.planes // apart, F.interleave, parts, F.steps * F.width // parts)
    count: tl.constexpr = COLS // F.item * SUMS
    sums = tl.reshape(tl.sum(tl.sum(tl.reshape(values, shape), 4), 1), (TOKENS, count))
    index = tl.arange(0, count)
    item = first // F.item + index // (SUMS * F.interleave) * F.interleave + index // parts % F.interleave
    group = index // (parts * F.interleave) % apart * parts + index % parts
    return item, group, sums


@triton.jit
def store_columns(
    out, out_token, out_head, values, token, alive, head, first, DIM: tl.constexpr, F: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr, THIRDS: tl.constexpr = 0,
) -> None:  # fmt: skip
    """Columns from `first` on of a head's DIM, [TOKENS, COLS]: into rows, or, if there is a format F, lanes or thirds.

    Where the format has offsets, COLS, DIM and `first` are multiples of the columns that interleaved items share.
    """
    cols = first + tl.arange(0, COLS)
    rows = out + token.to(tl.int64)[:, None] * out_token
    if F is None:
        tl.store(rows + (head * out_head + cols)[None, :], values, mask=alive[:, None] & (cols < DIM)[None, :])
    elif THIRDS > 0:
        own = token.to(tl.int32)[:, None]
        thirds = out.to(tl.pointer_type(tl.bfloat16)) + own * (F.steps * F.width)
        inside = alive[:, None] & (cols < DIM)[None, :]
        store_thirds(thirds + third_place(head * DIM + cols, F, THIRDS)[None, :], values, inside, F, THIRDS)
        if F.third_sums > 0:
            item, group, sums = _sums(values, head * DIM + first, F, F.third_sums, TOKENS, COLS)
            at = item * item_floats(F, THIRDS) + F.item * 3 * THIRDS // 2 + group * THIRDS
            tl.store(out + at[None, :] + own, sums, mask=alive[:, None])
    else:
        place = lane_place(head * DIM + cols, F)
        tl.store(rows + place[None, :], values, mask=alive[:, None] & (cols < DIM)[None, :])
        if F.num_sums > 0:
            item, group, sums = _sums(values, head * DIM + first, F, F.num_sums, TOKENS, COLS)
            at = item // 8 * ((F.item + F.num_sums) * 8) + (F.item + group) * 8 + item % 8
            tl.store(rows + at[None, :], sums, mask=alive[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_splits", "out_token", "out_head"])
def merge_kernel(
    parts,
    lse,
    sinks,
    out,
    out_token,
    out_head,
    num_rows,
    num_splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    F: tl.constexpr,
    THIRDS: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """COLS columns of a token and a head; `parts` is [splits, tokens, heads, DIM], `lse` [splits, tokens, heads]."""
    token, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLS
    row = (token * HEADS + head).to(tl.int64)
    dims = first + tl.arange(0, COLS)
    inside = (dims < DIM)[None, :]
    near = tl.arange(0, _FIRST)
    early = tl.load(
        parts + (near * num_rows + row)[:, None] * DIM + dims[None, :],
        mask=(near < num_splits)[:, None] & inside,
        other=0.0,
    )
    early_log = tl.load(lse + near * num_rows + row, mask=near < num_splits, other=float("-inf"))
    split = tl.arange(0, SPLITS_PAD)
    logs = tl.load(lse + split.to(tl.int64) * num_rows + row, mask=split < num_splits, other=float("-inf"))
    base = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + head) * _LOG2_E
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(tl.exp2(logs - base), 0)
    if SINKS:
        total += tl.exp2(sink - base)
    used = tl.max(tl.where(logs > float("-inf"), split + 1, 0), 0)
    early = tl.where((early_log > float("-inf"))[:, None], early * tl.exp2(early_log - base)[:, None], 0.0)
    sums = tl.sum(early, 0)
    for start in range(_FIRST, used, CHUNK):
        share = start + tl.arange(0, CHUNK)
        log = tl.load(lse + share.to(tl.int64) * num_rows + row, mask=share < used, other=float("-inf"))
        part = tl.load(
            parts + (share.to(tl.int64) * num_rows + row)[:, None] * DIM + dims[None, :],
            mask=(log > float("-inf"))[:, None] & inside,
            other=0.0,
        )
        sums += tl.sum(part * tl.exp2(log - base)[:, None], 0)
    sums *= tl.where(total > 0.0, 1.0 / total, 0.0)
    one = token + tl.arange(0, 1)
    store_columns(out, out_token, out_head, sums[None, :], one, one >= 0, head, first, DIM, F, 1, COLS, THIRDS)
