"""Attention over a paged cache on the CPU: sequences of different lengths in one call; see csrc/ops/attention.h.

The arguments are those of `triton.attention`, which does the same on a GPU. What a token gets depends on its own
sequence alone, to the bit, and on whether it is one of at least eight on a bfloat16 cache, which AMX goes through by
tiles unless the thread wants `independent_rows()`. This module knows no model, and no cache but its tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, check_shape, describe, vector_address
from moesaic.kernels.attention import cache_type

__all__ = ["check_block_size", "paged_attention", "paged_latent_attention", "pool_strides", "step_arguments"]

_ABSENT = (0, (0, 0, 0), 0, (0, 0, 0), 0)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal `softmax(scale * q k^T) v` (grouped-query: Ainslie et al., arXiv 2305.13245) over blocks of a pool.

    With n new tokens of sequence s, its token i is at position `seq_lens[s] - n + i`, and sees the keys up to its own.
    Sequences of length 0 get zeros.

    Args:
        q: float32 `[tokens, heads, head_dim]`, any strides, the last dimension contiguous, like all here.
        keys: float32, bfloat16 or float16 `[num_blocks, block_size, kv_heads, head_dim]`, those of q included.
        values: as keys, `[num_blocks, block_size, kv_heads, value_dim]`.
        block_tables: int32 `[seqs, max_blocks]`; what lies behind a sequence's blocks is never read.
        seq_lens: int32 `[seqs]`, new tokens included.
        query_start: int32 `[seqs + 1]`: tokens `query_start[s]` to `query_start[s + 1]` are of sequence s.
        scale: factor of the scores.
        sliding_window: only so many of the last keys are seen, a token's own among them.
        sinks: float32 `[heads]`, logits that take part in the softmax without a value (gpt-oss).
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).

    Returns:
        float32 `[tokens, heads, value_dim]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here, or tables lead out of the pool.
    """
    check_float("q", q, 3)
    tokens, heads, head_dim = q.shape
    blocks, block_size, kv_heads = keys.shape[:3] if keys.ndim == 4 else (0, 0, 0)
    kind = cache_type("keys", keys, (blocks, block_size, kv_heads, head_dim), keys.dtype)
    cache_type("values", values, (blocks, block_size, kv_heads, values.shape[-1]), keys.dtype)
    if kv_heads < 1 or heads % kv_heads:
        raise KernelError(f"q has {heads} heads and keys have {kv_heads}: expected a multiple of the latter.")
    out = torch.empty(tokens, heads, values.shape[-1])
    _attend(
        (q.data_ptr(), _query_strides(q), keys.data_ptr(), pool_strides(keys), head_dim),
        _ABSENT,
        values,
        kind,
        out,
        kv_heads,
        (block_tables, seq_lens, query_start),
        (blocks, block_size),
        (scale, softcap or 0.0, _window(sliding_window), vector_address("sinks", sinks, heads)),
    )
    return out


def paged_latent_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Multi-head latent attention, absorbed (arXiv 2405.04434): all heads attend to one pool of latents.

    The score is `scale * (q_latent . latent + q_rope . rope)` and the value is the latent.

    Args:
        q_latent: float32 `[tokens, heads, latent_dim]`, queries multiplied by the key half of kv_b.
        q_rope: float32 `[tokens, heads, rope_dim]`, rotated.
        cache: float32, bfloat16 or float16 `[num_blocks, block_size, latent_dim + rope_dim]`.
        block_tables: see `paged_attention`, like all that follow.
        seq_lens: int32 `[seqs]`.
        query_start: int32 `[seqs + 1]`.
        scale: factor of the scores.
        sliding_window: only so many of the last keys are seen.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        float32 `[tokens, heads, latent_dim]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here, or tables lead out of the pool.
    """
    check_float("q_latent", q_latent, 3)
    check_float("q_rope", q_rope, 3)
    tokens, heads, latent_dim = q_latent.shape
    rope_dim = q_rope.shape[2]
    check_shape("q_rope", q_rope, (tokens, heads, rope_dim))
    blocks, block_size = cache.shape[:2] if cache.ndim == 3 else (0, 0)
    kind = cache_type("cache", cache, (blocks, block_size, latent_dim + rope_dim), cache.dtype)
    latents, rope_keys = cache[..., :latent_dim], cache[..., latent_dim:]
    out = torch.empty(tokens, heads, latent_dim)
    _attend(
        (q_latent.data_ptr(), _query_strides(q_latent), latents.data_ptr(), pool_strides(latents), latent_dim),
        (q_rope.data_ptr(), _query_strides(q_rope), rope_keys.data_ptr(), pool_strides(rope_keys), rope_dim),
        latents,
        kind,
        out,
        1,
        (block_tables, seq_lens, query_start),
        (blocks, block_size),
        (scale, softcap or 0.0, _window(sliding_window), 0),
    )
    return out


def _attend(
    first: tuple[Any, ...],
    second: tuple[Any, ...],
    values: torch.Tensor,
    kind: int,
    out: torch.Tensor,
    kv_heads: int,
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pool: tuple[int, int],
    options: tuple[float, float, int, int],
) -> None:
    tokens, heads, value_dim = out.shape
    blocks, block_size = pool
    check_block_size(block_size)
    try:
        _native.paged_attention(
            first,
            second,
            values.data_ptr(),
            pool_strides(values),
            value_dim,
            kind,
            out.data_ptr(),
            _query_strides(out),
            tokens,
            kv_heads,
            heads // kv_heads,
            *step_arguments(*where),
            block_size,
            blocks,
            *options,
        )
    except ValueError as error:
        raise KernelError(f"The tables of a call do not go together: {error}.") from error


def check_block_size(block_size: int) -> None:
    """Refuse blocks that kernels cannot go through in whole steps.

    Raises:
        KernelError: it is no such number.
    """
    step = _native.ATTENTION_KEY_BLOCK
    if block_size < 1 or (block_size % step and step % block_size):
        raise KernelError(f"blocks of {block_size} positions: expected a multiple or a divisor of {step}.")


def pool_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of block, head and position of `[blocks, block_size, heads, dim]` or `[blocks, block_size, dim]`."""
    return x.stride(0), x.stride(2) if x.ndim == 4 else 0, x.stride(1)


def step_arguments(
    block_tables: torch.Tensor, seq_lens: torch.Tensor, query_start: torch.Tensor
) -> tuple[int, int, int, int, int]:
    """Where sequences are, as the extension takes it: tables, their width, lengths, starts, number of sequences.

    Raises:
        KernelError: shapes do not go together, or types are others.
    """
    seqs = len(seq_lens)
    if block_tables.ndim != 2 or len(block_tables) != seqs:
        raise KernelError(f"block_tables is {describe(block_tables)}: expected a row for each of {seqs} sequences.")
    return (
        vector_address("block_tables", block_tables, block_tables.numel(), torch.int32),
        block_tables.shape[1],
        vector_address("seq_lens", seq_lens, seqs, torch.int32),
        vector_address("query_start", query_start, seqs + 1, torch.int32),
        seqs,
    )


def _query_strides(x: torch.Tensor) -> tuple[int, int, int]:
    return 0, x.stride(1), x.stride(0)


def _window(sliding_window: int | None) -> int:
    if sliding_window is not None and sliding_window < 1:
        raise KernelError(f"sliding_window is {sliding_window}: expected at least 1.")
    return sliding_window or 0
