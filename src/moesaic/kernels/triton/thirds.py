"""Activations of a few tokens in three bfloat16 each, as tensor cores read them. It knows no weights and no model.

A float32 is the sum of three bfloat16, so codes that bfloat16 holds are multiplied with all bits of an activation, and
nothing but sums rounds. Activations are raised (`RAISED`) because codes may be subnormal numbers.

Items follow each other, each `[planes][3][tokens][4][n / 4]` bfloat16, n = steps * width the weights of a plane, then
float32 `[sums][tokens]`. Of the n, a quarter is of every fourth step, from the first to the fourth on; of those, first
columns 0 and 2 of the steps' four, then columns 1 and 3.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["RAISED", "item_floats", "store_item", "store_thirds", "third_of", "third_place"]

RAISED: tl.constexpr = tl.constexpr(80)
"""Activations are 2^80 times as large: exact for those below 2^48, for products above 2^-46 with the smallest codes."""


@triton.jit
def item_floats(F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """What an item takes."""
    return F.item * 3 * TOKENS // 2 + F.third_sums * TOKENS


@triton.jit
def third_of(e, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Where an item has the first third of activation e of the first token, in bfloat16."""
    size: tl.constexpr = F.steps * F.width
    step, c = e % size // F.width, e % F.width
    if F.width > 2:
        pair, half = c // 4 * 2 + c % 2, c // 2 % 2
    else:
        pair, half = 0, c
    quarter = step % 4 * (size // 4) + (pair * (F.steps // 4) + step // 4) * 2 + half
    return e // size * (3 * TOKENS * size) + quarter


@triton.jit
def third_place(k, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Where thirds have the first one of column k of the first token, in bfloat16."""
    piece: tl.constexpr = F.steps * F.width
    apart: tl.constexpr = F.interleave * piece
    whole: tl.constexpr = F.interleave * F.item
    n = k // whole * F.interleave + k % apart // piece
    return n * (2 * item_floats(F, TOKENS)) + third_of(k % whole // apart * piece + k % piece, F, TOKENS)


@triton.jit
def store_thirds(at, values, mask, F: tl.constexpr, TOKENS: tl.constexpr) -> None:
    """Write activations; `at` points to the first third of each."""
    rest = values * 2.0**80  # RAISED
    for third in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        rest -= part.to(tl.float32)
        tl.store(at + third * (TOKENS * F.steps * F.width), part, mask=mask)


@triton.jit
def store_item(thirds, item, token, values, mask, F: tl.constexpr, TOKENS: tl.constexpr) -> None:
    """Write activations of items, and their sums.

    Args:
        item, token: with all dimensions of `values`, as far as they are not one.
        values: [.., item, n], `mask` [.., 1, n].
    """
    rank: tl.constexpr = len(values.shape)
    sums: tl.constexpr = F.third_sums
    size: tl.constexpr = F.steps * F.width
    at = thirds + item * item_floats(F, TOKENS)
    e = tl.arange(0, F.item)[:, None]
    group = tl.arange(0, max(sums, 1))[:, None]
    if rank == 3:
        e, group = e[None, :, :], group[None, :, :]
    places = at.to(tl.pointer_type(tl.bfloat16)) + (third_of(e, F, TOKENS) + token * size)
    store_thirds(places, values, mask, F, TOKENS)
    if sums > 0:
        if rank == 3:
            parts = tl.reshape(values, (values.shape[0], sums, F.item // sums, values.shape[2]))
        else:
            parts = tl.reshape(values, (sums, F.item // sums, values.shape[1]))
        added = tl.sum(parts, axis=rank - 1)
        tl.store(at + (F.item * 3 * TOKENS // 2 + group * TOKENS + token), added, mask=mask)
