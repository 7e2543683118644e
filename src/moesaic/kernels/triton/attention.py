"""Attention over a paged cache on a GPU: grouped-query and absorbed latent attention, decode and prefill.

Lengths and tables are read by the kernels, so a call can be captured in a graph and replayed with others. Operands of
the products are of the cache's type, sums are float32. This module knows no model, and no cache but its tensors.
"""

from __future__ import annotations

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe
from moesaic.kernels.triton.attention_kernels import attend_kernel, merge_kernel
from moesaic.kernels.triton.attention_tiles import Tiles, choose_tiles, padded

__all__ = ["paged_attention", "paged_latent_attention"]

_POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS_AT_ONCE = 16  # that the second kernel loads


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
    key_strides = (keys.stride(0), keys.stride(1), keys.stride(2))
    value_strides = (values.stride(0), values.stride(1), values.stride(2))
    return _attend(
        (q, q if q_rope is None else q_rope),
        (keys, values),
        (block_tables, seq_lens, query_start),
        (*q.stride()[:2], *((0, 0) if q_rope is None else q_rope.stride()[:2]), *key_strides, *value_strides),
        kv_heads=kv_heads,
        dims=(head_dim, rope_dim, values.shape[3]),
        latent=False,
        block_size=block_size,
        scale=scale,
        max_query_len=max_query_len,
        sliding_window=sliding_window,
        sinks=sinks,
        softcap=softcap,
        out=out,
        tiles=tiles,
    )


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
    _check_pool("cache", cache, 3)
    latent_dim = q_latent.shape[-1]
    rope_dim = cache.shape[2] - latent_dim
    if rope_dim < 1:
        raise KernelError(f"cache is {describe(cache)}: expected more than the {latent_dim} numbers of a latent.")
    _check_queries("q_latent", q_latent, (*q_latent.shape[:2], latent_dim), cache.device)
    _check_queries("q_rope", q_rope, (*q_latent.shape[:2], rope_dim), cache.device)
    strides = (cache.stride(0), cache.stride(1), 0)
    return _attend(
        (q_latent, q_rope),
        (cache, cache),
        (block_tables, seq_lens, query_start),
        (*q_latent.stride()[:2], *q_rope.stride()[:2], *strides, *strides),
        kv_heads=1,
        dims=(latent_dim, rope_dim, latent_dim),
        latent=True,
        block_size=cache.shape[1],
        scale=scale,
        max_query_len=max_query_len,
        sliding_window=sliding_window,
        sinks=None,
        softcap=softcap,
        out=out,
        tiles=tiles,
    )


def _attend(
    queries: tuple[torch.Tensor, torch.Tensor],
    pool: tuple[torch.Tensor, torch.Tensor],
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    strides: tuple[int, ...],
    *,
    kv_heads: int,
    dims: tuple[int, int, int],
    latent: bool,
    block_size: int,
    scale: float,
    max_query_len: int,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
    out: torch.Tensor | None,
    tiles: Tiles | None,
) -> torch.Tensor:
    """Both kinds of attention; dims are those of a key, of its second part, and of a value, which latents share."""
    q, device = queries[0], pool[0].device
    num_tokens, heads = q.shape[:2]
    block_tables, seq_lens, query_start = step
    num_seqs = seq_lens.numel()
    for name, x, shape in (
        ("block_tables", block_tables, (num_seqs, *block_tables.shape[1:])),
        ("seq_lens", seq_lens, (num_seqs,)),
        ("query_start", query_start, (num_seqs + 1,)),
    ):
        if x.dtype != torch.int32 or x.shape != shape or x.device != device or x.stride(-1) != 1:
            raise KernelError(f"{name} is {describe(x)}: expected int32 {list(shape)} on {device}.")
    if sliding_window is not None and sliding_window < 1:
        raise KernelError(f"sliding_window is {sliding_window}: expected at least 1.")
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise KernelError(f"sinks is {describe(sinks)}: expected float32 [{heads}], contiguous.")
    key_dim, rope_dim, value_dim = dims
    if out is None:
        out = torch.empty(num_tokens, heads, value_dim, device=device)
    else:
        _check_queries("out", out, (num_tokens, heads, value_dim), device)
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = heads // kv_heads
    if tiles is None:
        longest = block_tables.shape[1] * block_size
        if sliding_window is not None:
            longest = min(longest, sliding_window + max_query_len)
        sizes = tuple(padded(dim) if dim else 0 for dim in dims)
        columns = num_seqs * kv_heads
        tiles = choose_tiles(max_query_len * group, columns, longest, sizes, pool[0].dtype, device, latent)
    target, lse = out.unsqueeze(0), out
    if tiles.splits > 1:
        target = torch.empty(tiles.splits, num_tokens, heads, value_dim, device=device)
        lse = torch.empty(tiles.splits, num_tokens, heads, device=device)
    attend_kernel[(triton.cdiv(max_query_len * group, tiles.rows), num_seqs * kv_heads, tiles.splits)](
        *queries,
        *pool,
        *step,
        q if sinks is None else sinks,
        target,
        lse,
        scale,
        softcap or 0.0,
        sliding_window or 0,
        *strides,
        block_tables.stride(0),
        *target.stride()[:3],
        num_tokens * heads,
        tiles.splits,
        GROUP=group,
        KV_HEADS=kv_heads,
        KEY_DIM=key_dim,
        KEY_PAD=padded(key_dim),
        ROPE_DIM=rope_dim,
        ROPE_PAD=padded(rope_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        IS_SPLIT=tiles.splits > 1,
        WINDOWED=sliding_window is not None,
        SOFTCAP=bool(softcap),
        SINKS=sinks is not None,
        LATENT=latent,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if tiles.splits > 1:
        value_block = min(padded(value_dim), 128)
        merge_kernel[(num_tokens, heads, triton.cdiv(value_dim, value_block))](
            target,
            lse,
            q if sinks is None else sinks,
            out,
            out.stride(0),
            out.stride(1),
            num_tokens * heads,
            tiles.splits,
            NUM_HEADS=heads,
            VALUE_DIM=value_dim,
            VALUE_BLOCK=value_block,
            SPLITS_PAD=triton.next_power_of_2(tiles.splits),
            CHUNK=min(_PARTS_AT_ONCE, triton.next_power_of_2(tiles.splits)),
            SINKS=sinks is not None,
            num_warps=4,
        )
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
