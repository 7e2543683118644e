"""Attention over a paged cache on a GPU: grouped-query and absorbed latent attention, decode and prefill.

Lengths and tables are read by the kernels, so a call can be captured in a graph and replayed with others. Operands of
the products are of the cache's type, sums are float32. This module knows no model, and no cache but its tensors.
"""

from __future__ import annotations

import torch

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe
from moesaic.kernels.triton.attention_launch import AttentionCall
from moesaic.kernels.triton.attention_tiles import Tiles
from moesaic.kernels.triton.merge import Parts

__all__ = ["attention_parts", "latent_attention_parts", "paged_attention", "paged_latent_attention"]

_POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    q_rope: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Causal `softmax(scale * q k^T) v` (grouped-query: Ainslie et al., arXiv 2305.13245) over blocks of a pool.

    With n new tokens of sequence s, its token i is at position `seq_lens[s] - n + i`, and sees the keys up to its own.
    Sequences of length 0 get zeros. Tokens that no sequence has, and those of a sequence behind its first
    `max_query_len`, are not written.

    Args:
        q: float32 `[tokens, heads, head_dim]`, any strides, the last dimension contiguous, like all here.
        keys: float32, bfloat16 or float16 `[num_blocks, block_size, kv_heads, head_dim]`, those of q included.
        values: as keys, `[num_blocks, block_size, kv_heads, value_dim]`.
        block_tables: int32 `[seqs, max_blocks]`.
        seq_lens: int32 `[seqs]`, new tokens included.
        query_start: int32 `[seqs + 1]`: tokens `query_start[s]` to `query_start[s + 1]` are of sequence s.
        scale: factor of the scores.
        max_query_len: no sequence has more new tokens than that.
        sliding_window: only so many of the last keys are seen, a token's own among them.
        sinks: float32 `[heads]`, logits that take part in the softmax without a value (gpt-oss).
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        q_rope: float32 `[tokens, heads, rope_dim]`, the rest of the queries if keys are `head_dim + rope_dim` wide.
        out: float32 `[tokens, heads, value_dim]`, or None to allocate it.
        tiles: how the work is cut up; chosen by shapes if None.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    step = (block_tables, seq_lens, query_start)
    options = (scale, max_query_len, sliding_window, sinks, softcap)
    call = _grouped_call((q, q_rope), (keys, values), step, *options)
    return call.attend(_out(out, call), tiles)


def attention_parts(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tiles: Tiles | None = None,
) -> Parts:
    """What shares of the keys leave of `paged_attention`, whose arguments these are; `merge` adds it up, with sinks.

    Raises:
        KernelError: a tensor has another shape, type or layout than said there.
    """
    step = (block_tables, seq_lens, query_start)
    call = _grouped_call((q, None), (keys, values), step, scale, max_query_len, sliding_window, None, softcap)
    return call.attend_parts(tiles)


def paged_latent_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Multi-head latent attention, absorbed (arXiv 2405.04434): all heads attend to one pool of latents.

    The score is `scale * (q_latent . latent + q_rope . rope)` and the value is the latent, which is read once for both.

    Args:
        q_latent: float32 `[tokens, heads, latent_dim]`, queries multiplied by the key half of kv_b.
        q_rope: float32 `[tokens, heads, rope_dim]`, rotated.
        cache: float32, bfloat16 or float16 `[num_blocks, block_size, latent_dim + rope_dim]`.
        block_tables: see `paged_attention`, like all that follow.
        seq_lens: int32 `[seqs]`.
        query_start: int32 `[seqs + 1]`.
        scale: factor of the scores.
        max_query_len: no sequence has more new tokens than that.
        sliding_window: only so many of the last keys are seen.
        softcap: scores become `softcap * tanh(score / softcap)`.
        out: float32 `[tokens, heads, latent_dim]`, or None to allocate it.
        tiles: how the work is cut up; chosen by shapes if None.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    step = (block_tables, seq_lens, query_start)
    call = _latent_call((q_latent, q_rope), cache, step, scale, max_query_len, sliding_window, softcap)
    return call.attend(_out(out, call), tiles)


def latent_attention_parts(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    tiles: Tiles | None = None,
) -> Parts:
    """What shares of the keys leave of `paged_latent_attention`, whose arguments these are, of few tokens.

    Whether a sequence is short decides on the device how its rows and keys are cut, so one graph serves all lengths.

    Raises:
        KernelError: a tensor has another shape, type or layout than said there.
    """
    step = (block_tables, seq_lens, query_start)
    return _latent_call((q_latent, q_rope), cache, step, scale, max_query_len, None, None).attend_parts(tiles)


def _grouped_call(
    queries: tuple[torch.Tensor, torch.Tensor | None],
    pool: tuple[torch.Tensor, torch.Tensor],
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    max_query_len: int,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> AttentionCall:
    (q, q_rope), (keys, values) = queries, pool
    _check_pool("keys", keys, 4)
    _check_pool("values", values, 4)
    _, block_size, kv_heads, head_dim = keys.shape
    rope_dim = 0
    if q_rope is not None:
        rope_dim = q_rope.shape[-1]
        head_dim -= rope_dim
        _check_queries("q_rope", q_rope, (*q.shape[:2], rope_dim), keys.device)
    check_shape("values", values, (*keys.shape[:3], values.shape[3]))
    _check_queries("q", q, (q.shape[0], q.shape[1] if q.ndim == 3 else 0, head_dim), keys.device)
    if kv_heads < 1 or q.shape[1] % kv_heads or values.dtype != keys.dtype:
        raise KernelError(
            f"q has {q.shape[1]} heads, keys are {describe(keys)}, values {describe(values)}: expected a multiple of "
            "the heads of keys, and one type."
        )
    rope_strides = (0, 0) if q_rope is None else q_rope.stride()[:2]
    return AttentionCall(
        (q, q if q_rope is None else q_rope),
        pool,
        step,
        (*q.stride()[:2], *rope_strides, *keys.stride()[:3], *values.stride()[:3]),
        kv_heads,
        (head_dim, rope_dim, values.shape[3]),
        False,
        block_size,
        scale,
        max_query_len,
        sliding_window,
        sinks,
        softcap,
    )


def _latent_call(
    queries: tuple[torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    max_query_len: int,
    sliding_window: int | None,
    softcap: float | None,
) -> AttentionCall:
    q_latent, q_rope = queries
    _check_pool("cache", cache, 3)
    latent_dim = q_latent.shape[-1]
    rope_dim = cache.shape[2] - latent_dim
    if rope_dim < 1:
        raise KernelError(f"cache is {describe(cache)}: expected more than the {latent_dim} numbers of a latent.")
    _check_queries("q_latent", q_latent, (*q_latent.shape[:2], latent_dim), cache.device)
    _check_queries("q_rope", q_rope, (*q_latent.shape[:2], rope_dim), cache.device)
    strides = (cache.stride(0), cache.stride(1), 0)
    return AttentionCall(
        queries,
        (cache, cache),
        step,
        (*q_latent.stride()[:2], *q_rope.stride()[:2], *strides, *strides),
        1,
        (latent_dim, rope_dim, latent_dim),
        True,
        cache.shape[1],
        scale,
        max_query_len,
        sliding_window,
        None,
        softcap,
    )


def _out(out: torch.Tensor | None, call: AttentionCall) -> torch.Tensor:
    q, device = call.queries[0], call.pool[0].device
    shape = (*q.shape[:2], call.dims[2])
    if out is None:
        return torch.empty(shape, device=device)
    _check_queries("out", out, shape, device)
    return out


def _check_pool(name: str, x: torch.Tensor, ndim: int) -> None:
    if x.dtype not in _POOL_DTYPES or x.ndim != ndim or x.stride(-1) != 1:
        raise KernelError(
            f"{name} is {describe(x)}: expected float32, bfloat16 or float16 of {ndim} dimensions, contiguous in the "
            "last one."
        )


def _check_queries(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype != torch.float32 or x.ndim != 3 or x.shape != shape or x.device != device or x.stride(-1) != 1:
        raise KernelError(
            f"{name} is {describe(x)}: expected float32 {list(shape)} on {device}, contiguous in the last dimension."
        )
