"""What happens to queries, keys and values between projection and attention, in one launch.

Norms of heads, rotary positions (arXiv 2104.09864) and the way into the pool, with the options of the CPU's
`ops.norm_and_rotate_`; for latent attention, the norm of the latent, rotation, and the way into its pool. It knows no
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, choice, describe
from moesaic.kernels.ops import HEAD_NORMS, ROPE_LAYOUTS
from moesaic.kernels.triton.rotary_kernels import heads_kernel, latent_kernel

__all__ = ["HEADS_AT_ONCE", "RotaryTable", "check_latents", "latent_rotate_append", "norm_rotate_append"]

_POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS_AT_ONCE = 16
"""Heads whose rotary queries a program has in latent attention."""


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """Angles of all positions, made once for a model.

    Attributes:
        cos: float32 `[max_positions, num_pairs]`, contiguous; attention factors of a scaled rope are part of it.
        sin: the same.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __post_init__(self) -> None:
        for name, x in (("cos", self.cos), ("sin", self.sin)):
            if x.dtype != torch.float32 or x.ndim != 2 or x.shape != self.cos.shape or not x.is_contiguous():
                raise KernelError(f"{name} is {describe(x)}: expected float32 [positions, pairs], contiguous.")

    @property
    def num_pairs(self) -> int:
        """Pairs of dimensions that are rotated, from the first one on."""
        return self.cos.shape[1]


def norm_rotate_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: RotaryTable,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    layout: str = "half",
    norm: str = "none",
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, and put keys and values into a pool.

    Args:
        q: float32 `[tokens, heads, head_dim]`, any strides, the last dimension contiguous, like all here.
        k: float32 `[tokens, kv_heads, head_dim]`.
        v: float32 `[tokens, kv_heads, value_dim]`.
        table: its first 2 * num_pairs dimensions of a head are rotated; `[.., 0]`: none.
        positions: int64 `[tokens]`, rows of the table.
        keys: float32, bfloat16 or float16 `[num_blocks, block_size, kv_heads, head_dim]`.
        values: as keys, `[num_blocks, block_size, kv_heads, value_dim]`.
        slot_mapping: int64 `[tokens]`, `block * block_size + offset`; -1: the token goes nowhere.
        layout: of pairs, see `ops.norm_and_rotate_`.
        norm: of heads, see `ops.norm_and_rotate_`.
        q_norm: float32 `[head_dim]`, or `[heads * head_dim]` for "all_heads".
        k_norm: the same for k.
        eps: of the norm.
        out: float32, shape of q, other memory than q's; allocated if None.

    Returns:
        out, the queries for attention. k and v are not changed.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    tokens, heads, head_dim = _check_heads("q", q, q)
    _, kv_heads, _ = _check_heads("k", k, q)
    _, _, value_dim = _check_heads("v", v, q)
    check_shape("k", k, (tokens, kv_heads, head_dim))
    check_shape("v", v, (tokens, kv_heads, value_dim))
    block_size = keys.shape[1]
    check_shape("keys", keys, (keys.shape[0], block_size, kv_heads, head_dim))
    check_shape("values", values, (keys.shape[0], block_size, kv_heads, value_dim))
    _check_step(positions, slot_mapping, tokens, table, head_dim, (keys, values))
    norm_number, layout_number = choice("norm", norm, HEAD_NORMS), choice("layout", layout, ROPE_LAYOUTS)
    if norm != "none":
        over_all = norm == "all_heads"
        _check_weight("q_norm", q_norm, heads * head_dim if over_all else head_dim)
        _check_weight("k_norm", k_norm, kv_heads * head_dim if over_all else head_dim)
    out = torch.empty(q.shape, device=q.device) if out is None else out
    check_shape("out", out, q.shape)
    _check_heads("out", out, q)
    if tokens == 0:
        return out
    heads_kernel[(tokens, heads + kv_heads)](
        q,
        k,
        v,
        out,
        keys,
        values,
        table.cos,
        table.sin,
        positions,
        slot_mapping,
        q if q_norm is None else q_norm,
        q if k_norm is None else k_norm,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton.next_power_of_2(head_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        BLOCK_SIZE=block_size,
        PAIRS=table.num_pairs,
        LAYOUT=layout_number,
        NORM=norm_number,
        num_warps=4 if norm == "all_heads" else 1,
    )
    return out


def latent_rotate_append(
    compressed: torch.Tensor,
    q_rope: torch.Tensor,
    table: RotaryTable,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    *,
    layout: str = "half",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise latents, rotate the keys that all heads share, put both into a pool, and rotate queries.

    Args:
        compressed: float32 `[tokens, latent_dim + rope_dim]`, what `kv_a_proj_with_mqa` gave; not changed.
        q_rope: float32 `[tokens, heads, rope_dim]`, a view of the queries; not changed.
        table: with rope_dim / 2 pairs.
        positions: int64 `[tokens]`, rows of the table.
        cache: float32, bfloat16 or float16 `[num_blocks, block_size, latent_dim + rope_dim]`.
        slot_mapping: int64 `[tokens]`, `block * block_size + offset`; -1: the token goes nowhere.
        norm_weight: float32 `[latent_dim]`, of the latents' norm.
        eps: of the norm.
        layout: of pairs, see `ops.norm_and_rotate_`.
        out: float32, shape of q_rope, other memory; allocated, contiguous, if None.

    Returns:
        out, the rotated part of the queries for attention.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    tokens, heads = check_latents(compressed, q_rope, table, positions, cache, slot_mapping, norm_weight)
    rope_dim, latent_dim = q_rope.shape[2], len(norm_weight)
    out = torch.empty(q_rope.shape, device=q_rope.device) if out is None else out
    check_shape("out", out, q_rope.shape)
    _check_heads("out", out, q_rope)
    if tokens == 0:
        return out
    latent_kernel[(tokens, 1 + triton.cdiv(heads, HEADS_AT_ONCE))](
        compressed,
        q_rope,
        out,
        cache,
        table.cos,
        table.sin,
        positions,
        slot_mapping,
        norm_weight,
        eps,
        compressed.stride(0),
        *q_rope.stride()[:2],
        *out.stride()[:2],
        *cache.stride()[:2],
        HEADS=heads,
        HEADS_AT_ONCE=HEADS_AT_ONCE,
        LATENT_DIM=latent_dim,
        LATENT_PAD=triton.next_power_of_2(latent_dim),
        ROPE_PAD=triton.next_power_of_2(rope_dim),
        BLOCK_SIZE=cache.shape[1],
        PAIRS=table.num_pairs,
        LAYOUT=choice("layout", layout, ROPE_LAYOUTS),
        num_warps=2,
    )
    return out


def check_latents(
    compressed: torch.Tensor,
    q_rope: torch.Tensor,
    table: RotaryTable,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor,
) -> tuple[int, int]:
    """Tokens and heads of `latent_rotate_append`; KernelError if a tensor is not as described there."""
    tokens, heads, rope_dim = _check_heads("q_rope", q_rope, q_rope)
    width = compressed.shape[-1]
    latent_dim = width - rope_dim
    if compressed.dtype != torch.float32 or compressed.shape != (tokens, width) or compressed.stride(-1) != 1:
        raise KernelError(
            f"compressed is {describe(compressed)}: expected float32 [{tokens}, latents and rotary keys]."
        )
    check_shape("cache", cache, (*cache.shape[:2], width))
    _check_weight("norm_weight", norm_weight, latent_dim)
    _check_step(positions, slot_mapping, tokens, table, rope_dim, (cache,))
    if 2 * table.num_pairs != rope_dim:
        raise KernelError(f"{table.num_pairs} rotary pairs for {rope_dim} dimensions: expected half of them.")
    return tokens, heads


def _check_heads(name: str, x: torch.Tensor, like: torch.Tensor) -> tuple[int, int, int]:
    if x.dtype != torch.float32 or x.ndim != 3 or (x.stride(-1) != 1 and x.shape[-1] > 1) or x.device != like.device:
        raise KernelError(
            f"{name} is {describe(x)}: expected float32 [tokens, heads, dim] on {like.device}, contiguous in the last "
            "dimension."
        )
    return x.shape[0], x.shape[1], x.shape[2]


def _check_step(
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    tokens: int,
    table: RotaryTable,
    dim: int,
    pools: tuple[torch.Tensor, ...],
) -> None:
    for name, x in (("positions", positions), ("slot_mapping", slot_mapping)):
        if x.dtype != torch.int64 or x.shape != (tokens,) or not x.is_contiguous():
            raise KernelError(f"{name} is {describe(x)}: expected int64 [{tokens}], contiguous.")
    if 2 * table.num_pairs > dim:
        raise KernelError(f"{table.num_pairs} rotary pairs in heads of {dim}: expected at most half of the dimensions.")
    for pool in pools:
        if pool.dtype not in _POOL_DTYPES or pool.dtype != pools[0].dtype or pool.stride(-1) != 1:
            raise KernelError(
                f"a pool is {describe(pool)}: expected one of {', '.join(map(str, _POOL_DTYPES))} in all, contiguous "
                "in the last dimension."
            )


def _check_weight(name: str, x: torch.Tensor | None, size: int) -> None:
    if x is None:
        raise KernelError(f"{name} is missing: expected float32 [{size}].")
    if x.dtype != torch.float32 or x.shape != (size,) or not x.is_contiguous():
        raise KernelError(f"{name} is {describe(x)}: expected float32 [{size}], contiguous.")
