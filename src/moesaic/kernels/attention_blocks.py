"""The attention half of a pre-norm decoder layer as one native call; see `blocks`."""

from __future__ import annotations

from typing import Any

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, choice, describe, vector_address
from moesaic.kernels.attention import cache_type, full_mask, mask_arguments
from moesaic.kernels.block_parts import NO_MATRIX, NO_NORM, HeadLinears, Linear, Norm
from moesaic.kernels.ops import HEAD_NORMS, ROPE_LAYOUTS, check_angles

__all__ = ["AttentionBlock", "LatentAttentionBlock", "cache_arguments"]


class _AttentionCall:
    """What the calls of both kinds of attention block check and pass on."""

    block: Any
    hidden: int
    heads: int
    num_pairs: int
    cache_shapes: tuple[tuple[int, int], tuple[int, int]]
    """(heads, dim) of what the cache holds as keys and as values."""

    def prepare(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        num_past: int,
        mask: torch.Tensor | None,
    ) -> tuple[tuple[Any, ...], int, tuple[Any, ...]]:
        """Check the arguments of a call.

        Returns:
            What the extension takes before the cache, the number of the cache's type, and the mask.
        """
        check_float("x", x, 3)
        batch, num_tokens, hidden = x.shape
        if hidden != self.hidden or not x.is_contiguous():
            raise KernelError(f"x is {describe(x)}: expected [batch, num_tokens, {self.hidden}], contiguous.")
        check_angles(cos, sin, batch, num_tokens, 2 * self.num_pairs)
        if cos.shape[2] != self.num_pairs:
            raise KernelError(f"cos is {describe(cos)}: expected {self.num_pairs} pairs.")
        capacity = caches[0].shape[2]
        if not 0 <= num_past <= capacity - num_tokens:
            raise KernelError(f"{num_past} tokens in a cache for {capacity}: no room for {num_tokens} more.")
        kind = self.check_caches(caches, batch, capacity, caches[0].dtype)
        mask = full_mask(mask, batch, self.heads, num_tokens, num_past + num_tokens)
        strides = cos.stride()
        inputs = (x.data_ptr(), batch, num_tokens, cos.data_ptr(), sin.data_ptr())
        return (*inputs, strides if cos.shape[0] == batch else (0, *strides[1:])), kind, mask_arguments(mask)

    def check_caches(
        self, caches: tuple[torch.Tensor, torch.Tensor], batch: int, capacity: int, dtype: torch.dtype
    ) -> int:
        """Check keys and values; returns the number of their type."""
        (key_heads, key_dim), (value_heads, value_dim) = self.cache_shapes
        cache_type("values", caches[1], (batch, value_heads, capacity, value_dim), dtype)
        return cache_type("keys", caches[0], (batch, key_heads, capacity, key_dim), dtype)

    def _call(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        num_past: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs, kind, mask_parts = self.prepare(x, cos, sin, caches, num_past, mask)
        out = torch.empty_like(x)
        self.block(*inputs, cache_arguments(caches), kind, num_past, *mask_parts, out.data_ptr())
        return out


def cache_arguments(caches: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
    """Keys and values as the extension takes them."""
    keys, values = caches
    return keys.data_ptr(), keys.stride(), values.data_ptr(), values.stride()


class AttentionBlock(_AttentionCall):
    """`x + residual_scale * o(attention(norm(x)))` of grouped-query attention with rotary positions.

    Args:
        norm: of the input.
        q: `[heads * head_dim, hidden]`.
        k: `[kv_heads * head_dim, hidden]`.
        v: as k.
        o: `[hidden, heads * head_dim]`.
        head_dim: width of a head.
        num_pairs: rotary pairs of a head.
        scale: factor of the scores.
        rope_layout: see `ops.norm_and_rotate_`.
        head_norm: see `ops.norm_and_rotate_`.
        q_norm: norm of the heads of queries, unless head_norm is "none".
        k_norm: the same of keys.
        sinks: float32 `[heads]`; see `ops.attention`.
        residual_scale: factor of what is added to x.

    Raises:
        KernelError: sizes do not go together.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        head_dim: int,
        num_pairs: int,
        scale: float,
        rope_layout: str = "half",
        head_norm: str = "none",
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        sinks: torch.Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        hidden = q.weight.cols
        heads, kv_heads = q.weight.rows // head_dim, k.weight.rows // head_dim
        if heads * head_dim != q.weight.rows or kv_heads * head_dim != k.weight.rows or heads % kv_heads:
            raise KernelError(f"q has {q.weight.rows} rows and k {k.weight.rows}: expected whole heads of {head_dim}.")
        if v.weight.rows != k.weight.rows or o.weight.rows != hidden:
            raise KernelError(f"v has {v.weight.rows} rows and o {o.weight.rows}: expected {k.weight.rows}, {hidden}.")
        if not 0 <= 2 * num_pairs <= head_dim or num_pairs > _native.MAX_ROTARY_PAIRS:
            raise KernelError(f"{num_pairs} rotary pairs in heads of {head_dim}.")
        q_width, k_width = (heads * head_dim, kv_heads * head_dim) if head_norm == "all_heads" else (head_dim, head_dim)
        if (head_norm != "none") != (q_norm is not None and k_norm is not None):
            raise KernelError(f"head_norm is '{head_norm}', which does not go with the norms given.")
        self.hidden, self.heads, self.kv_heads = hidden, heads, kv_heads
        self.head_dim, self.num_pairs = head_dim, num_pairs
        self.cache_shapes = ((kv_heads, head_dim), (kv_heads, head_dim))
        self._owners = (norm, q, k, v, o, q_norm, k_norm, sinks)  # the block holds addresses into these
        self.block = _native.AttentionBlock(
            norm.arguments("norm", hidden),
            q.arguments("q", hidden),
            k.arguments("k", hidden),
            v.arguments("v", hidden),
            o.arguments("o", heads * head_dim),
            heads,
            kv_heads,
            head_dim,
            choice("head_norm", head_norm, HEAD_NORMS),
            NO_NORM if q_norm is None else q_norm.arguments("q_norm", q_width),
            NO_NORM if k_norm is None else k_norm.arguments("k_norm", k_width),
            choice("rope_layout", rope_layout, ROPE_LAYOUTS),
            num_pairs,
            scale,
            vector_address("sinks", sinks, heads),
            residual_scale,
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        num_past: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the keys and values of x to the cache, and attend.

        Args:
            x: float32 `[batch, num_tokens, hidden]`, contiguous.
            cos: float32 `[batch or 1, num_tokens, num_pairs]`, any strides.
            sin: like cos.
            keys: float32, bfloat16 or float16 `[batch, kv_heads, capacity, head_dim]`: the keys of num_past tokens and
                room for num_tokens more.
            values: like keys, of the same type.
            num_past: tokens in the cache.
            mask: None: causal; or as in `ops.attention`, for num_past + num_tokens keys, causality included.

        Returns:
            float32 `[batch, num_tokens, hidden]`, in memory of its own.

        Raises:
            KernelError: a tensor has another shape, type or layout than said here.
        """
        return self._call(x, cos, sin, (keys, values), num_past, mask)


class LatentAttentionBlock(_AttentionCall):
    """`x + residual_scale * o(attention(norm(x)))` of multi-head latent attention (arXiv 2405.04434), absorbed.

    Args:
        norm: of the input.
        q_b: `[heads * (nope_dim + rope_dim), hidden]`, or of the rank of q_a instead of hidden.
        kv_a: `[latent_dim + rope_dim, hidden]`.
        kv_a_norm: of the latent.
        k_b: each head's half of kv_b that makes keys: `[nope_dim, latent_dim]`, or its transpose (see k_b_transposed).
        v_b: each head's half that makes values, `[value_dim, latent_dim]`.
        o: `[hidden, heads * value_dim]`.
        num_heads: heads.
        nope_dim: dimensions of a head without rotation.
        rope_dim: dimensions of a head with it.
        scale: factor of the scores.
        q_a: `[rank, hidden]`, if queries have a low rank.
        q_a_norm: of the queries of low rank; with q_a only.
        k_b_transposed: k_b is `[nope_dim, latent_dim]` per head, as kv_b is stored; otherwise `[latent_dim, nope_dim]`.
        rope_layout: see `ops.norm_and_rotate_`.
        residual_scale: factor of what is added to x.

    Raises:
        KernelError: sizes do not go together.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        q_b: Linear,
        kv_a: Linear,
        kv_a_norm: Norm,
        k_b: HeadLinears,
        v_b: HeadLinears,
        o: Linear,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        scale: float,
        q_a: Linear | None = None,
        q_a_norm: Norm | None = None,
        k_b_transposed: bool = True,
        rope_layout: str = "half",
        residual_scale: float = 1.0,
    ) -> None:
        hidden, latent_dim, value_dim = kv_a.weight.cols, kv_a.weight.rows - rope_dim, o.weight.cols // num_heads
        rank = hidden if q_a is None else q_a.weight.rows
        if (q_a is None) != (q_a_norm is None) or rope_dim % 2 or rope_dim < 2 or latent_dim < 1:
            raise KernelError(f"q_a {q_a}, q_a_norm {q_a_norm}, rope_dim {rope_dim}, latent_dim {latent_dim}.")
        if q_b.weight.rows != num_heads * (nope_dim + rope_dim) or o.weight.rows != hidden:
            raise KernelError(f"q_b has {q_b.weight.rows} rows and o {o.weight.rows} for {num_heads} heads.")
        if rope_dim // 2 > _native.MAX_ROTARY_PAIRS:
            raise KernelError(f"{rope_dim // 2} rotary pairs: expected at most {_native.MAX_ROTARY_PAIRS}.")
        self.hidden, self.heads, self.num_pairs = hidden, num_heads, rope_dim // 2
        self.latent_dim, self.rope_dim = latent_dim, rope_dim
        self.cache_shapes = ((1, latent_dim), (1, rope_dim))
        k_shape = (nope_dim, latent_dim) if k_b_transposed else (latent_dim, nope_dim)
        self._owners = (norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, k_b, v_b, o)  # the block holds addresses into these
        self.block = _native.LatentAttentionBlock(
            norm.arguments("norm", hidden),
            NO_MATRIX if q_a is None else q_a.arguments("q_a", hidden),
            NO_NORM if q_a_norm is None else q_a_norm.arguments("q_a_norm", rank),
            q_b.arguments("q_b", rank),
            kv_a.arguments("kv_a", hidden),
            kv_a_norm.arguments("kv_a_norm", latent_dim),
            o.arguments("o", num_heads * value_dim),
            k_b.arguments("k_b", num_heads, *k_shape),
            k_b_transposed,
            v_b.arguments("v_b", num_heads, value_dim, latent_dim),
            num_heads,
            nope_dim,
            rope_dim,
            latent_dim,
            value_dim,
            choice("rope_layout", rope_layout, ROPE_LAYOUTS),
            scale,
            residual_scale,
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        latents: torch.Tensor,
        rotary_keys: torch.Tensor,
        num_past: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the latents and rotated keys of x to the cache, and attend; arguments as those of `AttentionBlock`.

        Args:
            x: float32 `[batch, num_tokens, hidden]`, contiguous.
            cos: float32 `[batch or 1, num_tokens, rope_dim / 2]`, any strides.
            sin: like cos.
            latents: float32, bfloat16 or float16 `[batch, 1, capacity, latent_dim]`.
            rotary_keys: of the same type, `[batch, 1, capacity, rope_dim]`.
            num_past: tokens in the cache.
            mask: None: causal; or as in `ops.attention`, causality included.

        Returns:
            float32 `[batch, num_tokens, hidden]`, in memory of its own.

        Raises:
            KernelError: a tensor has another shape, type or layout than said here.
        """
        return self._call(x, cos, sin, (latents, rotary_keys), num_past, mask)
