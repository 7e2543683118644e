"""Latent attention of few tokens on a GPU: what comes before it and what comes behind it, in one launch each.

Weights are read once, straight into tensor cores; queries, what was attended to and all sums are float32. This module
knows no model.
"""

from __future__ import annotations

from typing import overload

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import choice, describe
from moesaic.kernels.ops import ROPE_LAYOUTS
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.attention_tiles import padded
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.latent_kernels import absorb_kernel, values_kernel
from moesaic.kernels.triton.merge import columns_together, lanes_of_heads
from moesaic.kernels.triton.rotary import HEADS_AT_ONCE, RotaryTable, check_latents

__all__ = ["MAX_LATENT_TOKENS", "absorb_and_append", "latent_values"]

MAX_LATENT_TOKENS = 8
"""Of more tokens a matrix is read more than once: they are for the library's products."""

_LEAST_TOKENS = 4  # three rows each, in tiles of 16
_ABSORBED_COLS, _VALUE_COLS = 128, 64
_WEIGHTS_PER_WARP = 4096  # 16 loads of 16 bytes per thread, all on their way at once


def absorb_and_append(
    query: torch.Tensor,
    compressed: torch.Tensor,
    weight: torch.Tensor,
    table: RotaryTable,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    *,
    layout: str = "half",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary.latent_rotate_append` of up to MAX_LATENT_TOKENS tokens, and queries times the key half of `kv_b_proj`.

    Args:
        query: float32 `[tokens, heads, nope_dim + rope_dim]`, any strides, the last dimension contiguous.
        compressed: as `latent_rotate_append`, like all that follow but the weight.
        weight: float32, bfloat16 or float16 `[heads, nope_dim, latent_dim]`, contiguous.
        table: see there.
        positions: see there.
        cache: see there.
        slot_mapping: see there.
        norm_weight: see there.
        eps: see there.
        layout: see there.

    Returns:
        queries on latents, float32 `[tokens, heads, latent_dim]`, and their rotated part,
        `[tokens, heads, rope_dim]`; both contiguous.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    rope_dim, latent_dim = 2 * table.num_pairs, len(norm_weight)
    nope_dim = query.shape[-1] - rope_dim
    tokens, heads = check_latents(compressed, query[..., nope_dim:], table, positions, cache, slot_mapping, norm_weight)
    _check_matrices(weight, heads, nope_dim)
    if weight.shape[2] != latent_dim:
        raise KernelError(f"weight is {describe(weight)}: expected {latent_dim} numbers of a latent in the last one.")
    _check_tokens(tokens)
    q_latent = torch.empty(tokens, heads, latent_dim, device=query.device)
    q_rope = torch.empty(tokens, heads, rope_dim, device=query.device)
    if tokens == 0:
        return q_latent, q_rope
    cols, nope_pad = min(padded(latent_dim), _ABSORBED_COLS), padded(nope_dim)
    programs = tokens * (1 + triton.cdiv(heads, HEADS_AT_ONCE)) + heads * triton.cdiv(latent_dim, cols)
    absorb_kernel[(programs,)](
        query,
        compressed,
        weight,
        q_latent,
        q_rope,
        cache,
        table.cos,
        table.sin,
        positions,
        slot_mapping,
        norm_weight,
        eps,
        tokens,
        *query.stride()[:2],
        compressed.stride(0),
        *cache.stride()[:2],
        HEADS=heads,
        HEADS_AT_ONCE=HEADS_AT_ONCE,
        NOPE_DIM=nope_dim,
        NOPE_PAD=nope_pad,
        ROPE_PAD=triton.next_power_of_2(rope_dim),
        LATENT_DIM=latent_dim,
        LATENT_PAD=triton.next_power_of_2(latent_dim),
        COLS=cols,
        TOKENS=max(_LEAST_TOKENS, triton.next_power_of_2(tokens)),
        BLOCK_SIZE=cache.shape[1],
        PAIRS=table.num_pairs,
        LAYOUT=choice("layout", layout, ROPE_LAYOUTS),
        num_warps=_warps(nope_pad * cols),
    )
    return q_latent, q_rope


@overload
def latent_values(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...
@overload
def latent_values(x: torch.Tensor, weight: torch.Tensor, *, form: DeviceFormat) -> Lanes: ...
def latent_values(x: torch.Tensor, weight: torch.Tensor, *, form: DeviceFormat | None = None) -> torch.Tensor | Lanes:
    """What heads attended to, times the value half of `kv_b_proj`, of up to MAX_LATENT_TOKENS tokens.

    Args:
        x: float32 `[tokens, heads, latent_dim]`, contiguous.
        weight: float32, bfloat16 or float16 `[heads, latent_dim, value_dim]`, contiguous.
        form: of the product that comes next, whose order the result is to have; it must fit (`merge.fits_lanes`).

    Returns:
        float32 `[tokens, heads, value_dim]`, or lanes of `heads * value_dim` columns.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here, or the form does not fit.
    """
    if x.dtype != torch.float32 or x.ndim != 3 or not x.is_contiguous():
        raise KernelError(f"x is {describe(x)}: expected float32 [tokens, heads, latent_dim], contiguous.")
    tokens, heads, latent_dim = x.shape
    _check_matrices(weight, heads, latent_dim)
    _check_tokens(tokens)
    value_dim = weight.shape[2]
    lanes = None if form is None else lanes_of_heads(form, tokens, heads, value_dim, x.device)
    out = torch.empty(tokens, heads, value_dim, device=x.device) if lanes is None else lanes.values
    if tokens > 0:
        thirds = 0 if lanes is None else lanes.thirds
        together = 1 if form is None else columns_together(form, thirds > 0)
        cols, latent_pad = min(padded(value_dim), max(_VALUE_COLS, together)), padded(latent_dim)
        values_kernel[(heads, triton.cdiv(value_dim, cols))](
            x,
            weight,
            out,
            out.stride(0),
            tokens,
            HEADS=heads,
            DIM=latent_dim,
            DIM_PAD=latent_pad,
            VALUE_DIM=value_dim,
            COLS=cols,
            TOKENS=max(_LEAST_TOKENS, triton.next_power_of_2(tokens)),
            F=form if form is None or thirds else form.lanes,
            THIRDS=thirds,
            num_warps=_warps(latent_pad * cols),
        )
    return out if lanes is None else lanes


def _warps(weights: int) -> int:
    """Of a program that multiplies so many weights."""
    return int(min(16, max(1, weights // _WEIGHTS_PER_WARP)))


def _check_matrices(weight: torch.Tensor, heads: int, rows: int) -> None:
    is_float = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not is_float or weight.ndim != 3 or weight.shape[:2] != (heads, rows) or not weight.is_contiguous():
        raise KernelError(
            f"weight is {describe(weight)}: expected float32, bfloat16 or float16 [{heads}, {rows}, n], contiguous."
        )


def _check_tokens(tokens: int) -> None:
    if tokens > MAX_LATENT_TOKENS:
        raise KernelError(f"{tokens} tokens: expected at most {MAX_LATENT_TOKENS}.")
