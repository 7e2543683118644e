"""Activations of a few tokens in three bfloat16 each, as tensor cores read them. It knows no weights and no model.

A float32 is the sum of three bfloat16, so codes that bfloat16 holds are multiplied with all bits of an activation, and
nothing but sums rounds. Activations are raised (`RAISED`) because codes may be subnormal numbers.

Items follow each other, each `[planes][3][tokens][4][n / 4]` bfloat16, n = steps * width the weights of a plane, then
float32 `[sums][tokens]`. Of the n, a quarter is of every fourth step, from the first to the fourth on; of those, first
columns 0 and 2 of the steps' four, then columns 1 and 3.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.activations import Lanes, column
from moesaic.kernels.triton.expert_kernels import lane_place
from moesaic.kernels.triton.formats import DeviceFormat

__all__ = ["RAISED", "Thirds", "item_floats", "to_thirds"]

RAISED: tl.constexpr = tl.constexpr(80)
"""Activations are 2^80 times as large: exact for those below 2^48, for products above 2^-46 with the smallest codes."""

_LEAST_TOKENS = 8  # that tensor cores multiply


@dataclass(frozen=True, slots=True, eq=False)
class Thirds:
    """Activations of a few tokens.

    Attributes:
        values: float32 `[items, n]`; what is there for tokens behind the last one is undefined.
        num_tokens: there are.
        tokens: there is room for, which is what kernels are made for.
    """

    values: torch.Tensor
    num_tokens: int
    tokens: int


@triton.jit
def item_floats(F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """What an item takes."""
    return F.item * 3 * TOKENS // 2 + F.third_sums * TOKENS


@triton.jit
def _place(e, F: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """Where an item has activation e of the first token, its first third."""
    size: tl.constexpr = F.steps * F.width
    step, c = e % size // F.width, e % F.width
    if F.width > 2:
        pair, half = c // 4 * 2 + c % 2, c // 2 % 2
    else:
        pair, half = 0, c
    quarter = step % 4 * (size // 4) + (pair * (F.steps // 4) + step // 4) * 2 + half
    return e // size * (3 * TOKENS * size) + quarter


@triton.jit
def store_item(thirds, item, token, values, F: tl.constexpr, TOKENS: tl.constexpr) -> None:
    """Write activations [tokens, item] of an item, and their sums; `token` is [tokens, 1]."""
    size: tl.constexpr = F.steps * F.width
    sums: tl.constexpr = F.third_sums
    tokens: tl.constexpr = values.shape[0]
    at = thirds + item.to(tl.int64) * item_floats(F, TOKENS)
    if sums > 0:
        groups = tl.sum(tl.reshape(values, (tokens, sums, F.item // sums)), axis=2)
        tl.store(at + F.item * 3 * TOKENS // 2 + tl.arange(0, sums)[None, :] * TOKENS + token, groups)
    places = at.to(tl.pointer_type(tl.bfloat16)) + _place(tl.arange(0, F.item)[None, :], F, TOKENS) + token * size
    rest = values * 2.0**80
    for third in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        rest -= part.to(tl.float32)
        tl.store(places + third * (TOKENS * size), part)


@triton.jit(do_not_specialize=["num_tokens"])
def _thirds_kernel(
    x, out, num_tokens, cols, x_stride, num_items, F: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr
) -> None:
    """A program has an item of TOKENS tokens."""
    item, group = tl.program_id(0), tl.program_id(1)
    own = tl.arange(0, TOKENS)[:, None]
    token = group * TOKENS + own
    k = column(item, tl.arange(0, F.item)[None, :], F)
    if LANES is not None:
        at = lane_place(k, LANES)
    else:
        at = k
    values = tl.load(x + token.to(tl.int64) * x_stride + at, mask=(token < num_tokens) & (k < cols), other=0.0)
    store_item(out, group * num_items + item, own, values, F, TOKENS)


def padded_tokens(num_tokens: int, most: int) -> int:
    """For how many tokens kernels are made that multiply so many, up to `most` at a time."""
    return max(_LEAST_TOKENS, min(most, triton.next_power_of_2(num_tokens)))


def to_thirds(x: torch.Tensor | Lanes, form: DeviceFormat, most: int) -> Thirds:
    """Activations float32 `[tokens, cols]`, rows any distance apart, or `lanes`, as thirds of up to `most` at a time."""
    if isinstance(x, Lanes):
        values, num_tokens, cols = x.values, x.num_tokens, x.cols
    else:
        values, (num_tokens, cols) = x, x.shape
    tokens = padded_tokens(num_tokens, most)
    num_items, groups = form.num_items(cols), triton.cdiv(num_tokens, tokens)
    size = form.item * 3 * tokens // 2 + form.third_sums * tokens
    out = torch.empty(groups * num_items, size, dtype=torch.float32, device=values.device)
    lanes = form if isinstance(x, Lanes) else None
    _thirds_kernel[(num_items, groups)](
        values, out, num_tokens, cols, values.stride(0), num_items, form, lanes, tokens, num_warps=1 if tokens == 8 else 2
    )
    return Thirds(out, num_tokens, tokens)
