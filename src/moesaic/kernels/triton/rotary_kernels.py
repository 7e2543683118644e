"""The device code of `rotary`.

A rotated dimension is `own * cos + sign * partner * sin`: where the two come from is all that layouts differ in, so a
program loads both from memory, and no layout moves numbers between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.ops import HEAD_NORMS, ROPE_LAYOUTS

__all__ = ["heads_kernel", "latent_kernel", "latent_part"]

_HALF: tl.constexpr = tl.constexpr(ROPE_LAYOUTS["half"])
_INTERLEAVED: tl.constexpr = tl.constexpr(ROPE_LAYOUTS["interleaved"])
_PER_HEAD: tl.constexpr = tl.constexpr(HEAD_NORMS["per_head"])
_AFTER_ROPE: tl.constexpr = tl.constexpr(HEAD_NORMS["per_head_after_rope"])
_ALL_HEADS: tl.constexpr = tl.constexpr(HEAD_NORMS["all_heads"])
_HEADS_IN_SUM: tl.constexpr = tl.constexpr(8)  # that are loaded at once for a norm over all


@triton.jit
def _sources(dims, PAIRS: tl.constexpr, LAYOUT: tl.constexpr):
    """Of each dimension after the rotation: is it rotated, its pair, and the two dimensions that it is made from."""
    rotated = dims < 2 * PAIRS
    if LAYOUT == _INTERLEAVED:
        pair, is_first = dims // 2, dims % 2 == 0
        own, partner = dims, dims ^ 1
    else:
        pair, is_first = dims % max(PAIRS, 1), dims < PAIRS
        if LAYOUT == _HALF:
            own, partner = dims, tl.where(is_first, dims + PAIRS, dims - PAIRS)
        else:  # interleaved, to half
            own, partner = 2 * pair + tl.where(is_first, 0, 1), 2 * pair + tl.where(is_first, 1, 0)
    sign = tl.where(is_first, -1.0, 1.0)
    return rotated, pair, tl.where(rotated, own, dims), tl.where(rotated, partner, dims), sign


@triton.jit
def _all_heads_sum(
    x, head_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Sum of squares of a token's heads."""
    dims = tl.arange(0, HEAD_PAD)
    squares = tl.zeros([AT_ONCE, HEAD_PAD], tl.float32)
    for first in tl.static_range(0, HEADS, AT_ONCE):
        head = first + tl.arange(0, AT_ONCE)
        part = tl.load(
            x + head[:, None] * head_stride + dims[None, :],
            mask=(head < HEADS)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        squares += part * part
    return tl.sum(tl.sum(squares, 1), 0)


@triton.jit
def _normed_and_rotated(
    x,
    head_stride,
    head,
    weight,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
):
    """One head of a token whose heads begin at x; cos and sin are its rows of the table."""
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    rotated, pair, own_dim, partner_dim, sign = _sources(dims, PAIRS, LAYOUT)
    source = x + head * head_stride
    own = tl.load(source + own_dim, mask=inside, other=0.0)
    partner = tl.load(source + partner_dim, mask=inside & rotated, other=0.0)
    if NORM == _PER_HEAD or NORM == _ALL_HEADS:  # noqa: SIM109 (not for constants of kernels)
        if NORM == _PER_HEAD:
            mean = tl.sum(own * own, 0) / HEAD_DIM
        else:
            mean = _all_heads_sum(x, head_stride, HEADS, HEAD_DIM, HEAD_PAD, _HEADS_IN_SUM) / (HEADS * HEAD_DIM)
            weight += head * HEAD_DIM
        factor = 1.0 / tl.sqrt(mean + eps)
        own *= factor * tl.load(weight + own_dim, mask=inside, other=0.0)
        partner *= factor * tl.load(weight + partner_dim, mask=inside & rotated, other=0.0)
    result = own
    if PAIRS > 0:
        own_cos = tl.load(cos + pair, mask=rotated, other=1.0)
        own_sin = tl.load(sin + pair, mask=rotated, other=0.0)
        result = tl.where(rotated, own * own_cos + sign * partner * own_sin, own)
    if NORM == _AFTER_ROPE:
        mean = tl.sum(result * result, 0) / HEAD_DIM
        result *= 1.0 / tl.sqrt(mean + eps) * tl.load(weight + dims, mask=inside, other=0.0)
    return result


@triton.jit
def heads_kernel(
    q,
    k,
    v,
    out,
    keys,
    values,
    cos,
    sin,
    positions,
    slot_mapping,
    q_norm,
    k_norm,
    eps,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
):
    """A head of queries of a token; or, behind those, a head of its keys and values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    angles = tl.load(positions + token) * PAIRS
    if head < HEADS:
        query = _normed_and_rotated(
            q + token * q_token, q_head, head, q_norm, cos + angles, sin + angles, eps,
            HEADS, HEAD_DIM, HEAD_PAD, PAIRS, LAYOUT, NORM,
        )  # fmt: skip
        tl.store(out + token * out_token + head * out_head + dims, query, mask=inside)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head -= HEADS
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            key = _normed_and_rotated(
                k + token * k_token, k_head, head, k_norm, cos + angles, sin + angles, eps,
                KV_HEADS, HEAD_DIM, HEAD_PAD, PAIRS, LAYOUT, NORM,
            )  # fmt: skip
            target = keys + block * key_block + offset * key_slot + head * key_head
            tl.store(target + dims, key.to(keys.dtype.element_ty), mask=inside)
            value_dims = tl.arange(0, VALUE_PAD)
            value = tl.load(v + token * v_token + head * v_head + value_dims, mask=value_dims < VALUE_DIM, other=0.0)
            target = values + block * value_block + offset * value_slot + head * value_head
            tl.store(target + value_dims, value.to(values.dtype.element_ty), mask=value_dims < VALUE_DIM)


@triton.jit
def latent_part(
    token,
    part,
    compressed,
    q_rope,
    out,
    cache,
    cos,
    sin,
    positions,
    slot_mapping,
    norm_weight,
    eps,
    compressed_token,
    q_token,
    q_head,
    out_token,
    out_head,
    cache_block,
    cache_slot,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Part 0: the latent and the rotary key of a token; behind it, some heads of its queries each. `token`: int64."""
    dims = tl.arange(0, ROPE_PAD)
    rotated, pair, own_dim, partner_dim, sign = _sources(dims, PAIRS, LAYOUT)  # all of rope_dim is rotated
    angles = tl.load(positions + token) * PAIRS
    own_cos = tl.load(cos + angles + pair, mask=rotated, other=1.0)
    own_sin = sign * tl.load(sin + angles + pair, mask=rotated, other=0.0)
    if part > 0:
        head = (part - 1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
        inside = (head < HEADS)[:, None] & rotated[None, :]
        source = q_rope + token * q_token + head[:, None] * q_head
        own = tl.load(source + own_dim[None, :], mask=inside, other=0.0)
        partner = tl.load(source + partner_dim[None, :], mask=inside, other=0.0)
        target = out + token * out_token + head[:, None] * out_head
        tl.store(target + dims[None, :], own * own_cos[None, :] + partner * own_sin[None, :], mask=inside)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            source = compressed + token * compressed_token
            target = cache + slot // BLOCK_SIZE * cache_block + slot % BLOCK_SIZE * cache_slot
            cols = tl.arange(0, LATENT_PAD)
            latent = tl.load(source + cols, mask=cols < LATENT_DIM, other=0.0)
            latent *= 1.0 / tl.sqrt(tl.sum(latent * latent, 0) / LATENT_DIM + eps)
            latent *= tl.load(norm_weight + cols, mask=cols < LATENT_DIM, other=0.0)
            tl.store(target + cols, latent.to(cache.dtype.element_ty), mask=cols < LATENT_DIM)
            own = tl.load(source + LATENT_DIM + own_dim, mask=rotated, other=0.0)
            partner = tl.load(source + LATENT_DIM + partner_dim, mask=rotated, other=0.0)
            key = own * own_cos + partner * own_sin
            tl.store(target + LATENT_DIM + dims, key.to(cache.dtype.element_ty), mask=rotated)


@triton.jit
def latent_kernel(
    compressed,
    q_rope,
    out,
    cache,
    cos,
    sin,
    positions,
    slot_mapping,
    norm_weight,
    eps,
    compressed_token,
    q_token,
    q_head,
    out_token,
    out_head,
    cache_block,
    cache_slot,
    HEADS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    LATENT_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """See `rotary.latent_rotate_append`: a program for each part of a token."""
    latent_part(
        tl.program_id(0).to(tl.int64), tl.program_id(1), compressed, q_rope, out, cache, cos, sin, positions,
        slot_mapping, norm_weight, eps, compressed_token, q_token, q_head, out_token, out_head, cache_block,
        cache_slot, HEADS, HEADS_AT_ONCE, LATENT_DIM, LATENT_PAD, ROPE_PAD, BLOCK_SIZE, PAIRS, LAYOUT,
    )  # fmt: skip
