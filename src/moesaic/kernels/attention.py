"""Attention over a key/value cache on the CPU: torch tensors in, torch tensors out.

Keys are read once for all query heads that share them, in blocks, with a running softmax; see csrc/ops/attention.h.
This module knows no model, and no cache but its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, check_shape, describe, vector_address

__all__ = ["attention", "cache_type", "full_mask", "mask_arguments", "mla_attention"]

_CACHE_TYPES: Mapping[torch.dtype, int] = MappingProxyType(
    {
        torch.float32: _native.CacheType.F32.value,
        torch.bfloat16: _native.CacheType.BF16.value,
        torch.float16: _native.CacheType.F16.value,
    }
)
_MASK_TYPES: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.bool: _native.MaskType.BOOL.value, torch.float32: _native.MaskType.ADDITIVE.value}
)
_NO_MASK = (_native.MaskType.NONE.value, 0, (0, 0, 0))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal_offset: int | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`softmax(scale * q k^T, masked) v`, grouped-query (Ainslie et al., arXiv 2305.13245).

    A row that may see no key at all gives zeros. An additive mask is added as it is, so that a row whose keys all got
    the lowest finite number is their mean, as in transformers' eager attention.

    Args:
        q: float32 `[batch, heads, num_queries, key_dim]`; any strides, the last dimension contiguous, like all here.
        k: float32, bfloat16 or float16 `[batch, kv_heads, num_keys, key_dim]`; kv_heads divides heads, and neighbouring
            heads of q share one of k.
        v: as k, `[batch, kv_heads, num_keys, value_dim]`.
        scale: factor of the scores.
        causal_offset: query i sees keys 0 to causal_offset + i; a number, or int64 `[batch]`; None: all keys.
        mask: bool (True: visible) or float32 (added to the scores), on top of causal_offset,
            `[batch or 1, heads or 1, num_queries or 1, >= num_keys]`.
        sliding_window: of the keys up to causal_offset + i only the last so many are seen; needs causal_offset.
        sinks: float32 `[heads]`, logits that take part in the softmax without a value (gpt-oss).
        softcap: scores become `softcap * tanh(score / softcap)` before the mask (Gemma 2).
        out: float32 `[batch, num_queries, heads, value_dim]`, or None to allocate it.

    Returns:
        out: float32 `[batch, num_queries, heads, value_dim]`, ready to be viewed as `[.., heads * value_dim]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    check_float("q", q, 4)
    batch, heads, num_queries, key_dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    kind = cache_type("k", k, (batch, kv_heads, num_keys, key_dim), k.dtype)
    cache_type("v", v, (batch, kv_heads, num_keys, v.shape[-1]), k.dtype)
    if kv_heads == 0 or heads % kv_heads:
        raise KernelError(f"q has {heads} heads and k has {kv_heads}: expected a multiple of the latter.")
    if sliding_window is not None and (causal_offset is None or sliding_window < 1):
        raise KernelError(f"sliding_window is {sliding_window}: expected at least 1, and a causal_offset with it.")
    value_dim = v.shape[3]
    mask = full_mask(mask, batch, heads, num_queries, num_keys)
    if out is None:
        out = torch.empty(batch, num_queries, heads, value_dim)
    else:
        check_float("out", out, 4)
        check_shape("out", out, (batch, num_queries, heads, value_dim))
    out_batch, out_token, out_head, _ = out.stride()
    _native.attention(
        q.data_ptr(),
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        kind,
        out.data_ptr(),
        (out_batch, out_head, out_token),
        batch,
        kv_heads,
        heads // kv_heads,
        num_queries,
        num_keys,
        key_dim,
        value_dim,
        scale,
        softcap or 0.0,
        *_causal(causal_offset, batch),
        sliding_window or 0,
        vector_address("sinks", sinks, heads),
        *mask_arguments(mask),
    )
    return out


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    rope_cache: torch.Tensor,
    *,
    scale: float,
    causal_offset: int | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head latent attention, absorbed (arXiv 2405.04434): all heads attend to one cache of latents.

    The score is `scale * (q_latent . latent + q_rope . rope)` and the value is the latent. Other arguments as in
    `attention`.

    Args:
        q_latent: float32 `[batch, heads, num_queries, latent_dim]`, queries multiplied by the key half of kv_b.
        q_rope: float32 `[batch, heads, num_queries, rope_dim]`, rotated.
        latent_cache: float32, bfloat16 or float16 `[batch, num_keys, latent_dim]`, normalised latents.
        rope_cache: the same type `[batch, num_keys, rope_dim]`, rotated keys.
        scale: factor of the scores.
        causal_offset: see `attention`.
        mask: see `attention`.
        sliding_window: see `attention`.
        sinks: see `attention`.
        softcap: see `attention`.
        out: float32 `[batch, heads, num_queries, latent_dim]`, or None to allocate it.

    Returns:
        out: float32 `[batch, heads, num_queries, latent_dim]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    check_float("q_latent", q_latent, 4)
    check_float("q_rope", q_rope, 4)
    batch, heads, num_queries, latent_dim = q_latent.shape
    rope_dim, num_keys = q_rope.shape[3], latent_cache.shape[1]
    check_shape("q_rope", q_rope, (batch, heads, num_queries, rope_dim))
    kind = cache_type("latent_cache", latent_cache, (batch, num_keys, latent_dim), latent_cache.dtype)
    cache_type("rope_cache", rope_cache, (batch, num_keys, rope_dim), latent_cache.dtype)
    if sliding_window is not None and (causal_offset is None or sliding_window < 1):
        raise KernelError(f"sliding_window is {sliding_window}: expected at least 1, and a causal_offset with it.")
    mask = full_mask(mask, batch, heads, num_queries, num_keys)
    if out is None:
        out = torch.empty(batch, heads, num_queries, latent_dim)
    else:
        check_float("out", out, 4)
        check_shape("out", out, (batch, heads, num_queries, latent_dim))
    latent_batch, latent_token, _ = latent_cache.stride()
    rope_batch, rope_token, _ = rope_cache.stride()
    _native.mla_attention(
        q_latent.data_ptr(),
        q_latent.stride(),
        q_rope.data_ptr(),
        q_rope.stride(),
        latent_cache.data_ptr(),
        (latent_batch, 0, latent_token),
        rope_cache.data_ptr(),
        (rope_batch, 0, rope_token),
        kind,
        out.data_ptr(),
        out.stride(),
        batch,
        heads,
        num_queries,
        num_keys,
        latent_dim,
        rope_dim,
        scale,
        softcap or 0.0,
        *_causal(causal_offset, batch),
        sliding_window or 0,
        vector_address("sinks", sinks, heads),
        *mask_arguments(mask),
    )
    return out


def cache_type(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Check one tensor of a cache; returns the number of its type."""
    kind = _CACHE_TYPES.get(x.dtype)
    if kind is None or x.dtype != dtype or x.shape != shape or not x.is_cpu or (x.stride(-1) != 1 and shape[-1] > 1):
        raise KernelError(
            f"{name} is {describe(x)}: expected {list(shape)} of float32, bfloat16 or float16 (keys and values alike) "
            "on the CPU, contiguous in the last dimension."
        )
    return kind


def _causal(offset: int | torch.Tensor | None, batch: int) -> tuple[bool, int, int]:
    """Is there a causal mask, its offset if it is one number, and the address of the offsets if they are many."""
    if offset is None:
        return False, 0, 0
    if isinstance(offset, int):
        return True, offset, 0
    return True, 0, vector_address("causal_offset", offset, batch, torch.int64)


def full_mask(
    mask: torch.Tensor | None, batch: int, heads: int, num_queries: int, num_keys: int
) -> torch.Tensor | None:
    """The mask with a row for every batch row, head and query, contiguous in the keys; a view where it can be one."""
    if mask is None:
        return None
    if mask.dtype not in _MASK_TYPES or mask.ndim != 4 or mask.shape[3] < num_keys or not mask.is_cpu:
        raise KernelError(
            f"mask is {describe(mask)}: expected bool or float32 "
            f"[{batch} or 1, {heads} or 1, {num_queries}, at least {num_keys}] on the CPU."
        )
    if mask.shape[3] > 1 and mask.stride(3) != 1:
        mask = mask.contiguous()
    shape = (batch, heads, num_queries, mask.shape[3])
    if mask.shape == shape:
        return mask
    if any(have not in (1, want) for have, want in zip(mask.shape, shape, strict=True)):
        raise KernelError(f"mask has shape {list(mask.shape)}, which does not broadcast to {list(shape)}.")
    return mask.expand(shape)


def mask_arguments(mask: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """Type, address and strides of a mask."""
    return _NO_MASK if mask is None else (_MASK_TYPES[mask.dtype], mask.data_ptr(), mask.stride())
