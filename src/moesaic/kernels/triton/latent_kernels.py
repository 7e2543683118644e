"""Device code of what surrounds latent attention of few tokens; see `latent`.

Heads have a matrix each, which a program reads once, some of its columns, and multiplies by all tokens' rows of the
head on tensor cores. Three bfloat16 hold all bits of a float32, so rows are three times there, and lose nothing.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moesaic.kernels.triton._dot import dot
from moesaic.kernels.triton.merge_kernels import store_columns
from moesaic.kernels.triton.rotary_kernels import latent_part

__all__ = ["absorb_kernel", "values_kernel"]


@triton.jit
def _product(
    x, x_token, x_head, weight, head, first, num_tokens, IN: tl.constexpr, IN_PAD: tl.constexpr, OUT: tl.constexpr,
    COLS: tl.constexpr, TOKENS: tl.constexpr,
) -> Any:  # fmt: skip
    """COLS columns from `first` on of all tokens' rows of a head, times `weight` [heads, IN, OUT]: [TOKENS, COLS]."""
    dims, cols = tl.arange(0, IN_PAD), first + tl.arange(0, COLS)
    row = tl.arange(0, 4 * TOKENS)
    token, part = row % TOKENS, (row // TOKENS)[:, None]
    rows = tl.load(
        x + (token.to(tl.int64) * x_token + head * x_head)[:, None] + dims[None, :],
        mask=((token < num_tokens) & (row < 3 * TOKENS))[:, None] & (dims < IN)[None, :],
        other=0.0,
    )
    at = weight + head.to(tl.int64) * (IN * OUT) + dims[:, None] * OUT + cols[None, :]
    if IN == IN_PAD and OUT % COLS == 0:
        matrix = tl.load(at)
    else:
        matrix = tl.load(at, mask=(dims < IN)[:, None] & (cols < OUT)[None, :], other=0.0)
    high = rows.to(matrix.dtype)
    left = rows - high.to(tl.float32)
    middle = left.to(matrix.dtype)
    low = (left - middle.to(tl.float32)).to(matrix.dtype)
    rows = tl.where(part == 0, high, tl.where(part == 1, middle, low))
    products = dot(rows, matrix, tl.zeros([4 * TOKENS, COLS], tl.float32))
    return tl.sum(tl.reshape(products, (4, TOKENS, COLS)), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def absorb_kernel(
    query,
    compressed,
    weight,
    q_latent,
    q_rope,
    cache,
    cos,
    sin,
    positions,
    slot_mapping,
    norm_weight,
    eps,
    num_tokens,
    query_token,
    query_head,
    compressed_token,
    cache_block,
    cache_slot,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    NOPE_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    LAYOUT: tl.constexpr,
) -> None:
    """The parts of `latent_kernel` of all tokens; and behind those, columns of a head's queries times its keys."""
    parts: tl.constexpr = 1 + (HEADS + HEADS_AT_ONCE - 1) // HEADS_AT_ONCE
    index = tl.program_id(0)
    if index < num_tokens * parts:
        latent_part(
            (index // parts).to(tl.int64), index % parts, compressed, query + NOPE_DIM, q_rope, cache, cos, sin,
            positions, slot_mapping, norm_weight, eps, compressed_token, query_token, query_head, HEADS * 2 * PAIRS,
            2 * PAIRS, cache_block, cache_slot, HEADS, HEADS_AT_ONCE, LATENT_DIM, LATENT_PAD, ROPE_PAD, BLOCK_SIZE,
            PAIRS, LAYOUT,
        )  # fmt: skip
    else:
        blocks: tl.constexpr = (LATENT_DIM + COLS - 1) // COLS
        index -= num_tokens * parts
        head, first = index // blocks, index % blocks * COLS
        values = _product(
            query, query_token, query_head, weight, head, first, num_tokens, NOPE_DIM, NOPE_PAD, LATENT_DIM, COLS,
            TOKENS,
        )  # fmt: skip
        token = tl.arange(0, TOKENS)
        store_columns(
            q_latent, HEADS * LATENT_DIM, LATENT_DIM, values, token, token < num_tokens, head, first, LATENT_DIM, None,
            TOKENS, COLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "out_token"])
def values_kernel(
    x,
    weight,
    out,
    out_token,
    num_tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    F: tl.constexpr,
    THIRDS: tl.constexpr,
) -> None:
    """COLS columns of a head: x [tokens, heads, DIM] times `weight` [heads, DIM, VALUE_DIM]."""
    head, first = tl.program_id(0), tl.program_id(1) * COLS
    values = _product(
        x, HEADS * DIM, DIM, weight, head, first, num_tokens, DIM, DIM_PAD, VALUE_DIM, COLS, TOKENS
    )  # fmt: skip
    token = tl.arange(0, TOKENS)
    store_columns(
        out, out_token, VALUE_DIM, values, token, token < num_tokens, head, first, VALUE_DIM, F, TOKENS, COLS, THIRDS
    )  # fmt: skip
