"""Experts that a step brings to the GPU itself: which of those that are missing, and their way there.

`pick` is a part of the hand-off's kernel: it takes some of the distinct experts that are in no slot from the CPU, as
many as a table in device memory says, so that a captured graph follows changes of the table. `bring_experts` reads
them from page-locked memory as a copy does, whole lines side by side and every byte once, however many tokens chose an
expert; what is computed from them then lies in VRAM. This module knows neither who fills the table nor what is
computed.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.experts import ExpertLayout, MatrixLayout

__all__ = ["MAX_PICKED", "Picks", "bring_experts", "pick"]

MAX_PICKED = 16
"""Experts of a layer that a step brings, at most."""

_WORD = 4  # bytes
_BLOCK = 4096  # words that a program has under way
_PROGRAMS = 64  # of a matrix: they keep any link busy


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """Which experts a step brings to the GPU; on the device.

    Attributes:
        numbers: int32 `[n + 1]`: how many to bring if 0, 1, ... n distinct experts are missing.
        landing: int32 `[num_slots]`, at most MAX_PICKED: out, the expert that each slot gets, -1: none.
        slots: int32 `[tokens, top_k]`: out, the slot of each choice, -1: it is not brought.
        counts: int64 `[2]`: distinct experts that were missing, and brought; added up.
    """

    numbers: torch.Tensor
    landing: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor


@triton.jit
def pick(missing, slots, landing, numbers, counts, num_choices, num_slots, CHOICES: tl.constexpr, SLOTS: tl.constexpr):
    """Choose what is brought, for a kernel with one program; returns the experts that are left to the CPU.

    Those that most tokens chose come first (the way of an expert takes as long for all of them), then those of earlier
    choices. What the CPU and the GPU compute are different experts, so none is read by both.
    """
    row, col = tl.arange(0, CHOICES), tl.arange(0, CHOICES)
    own = tl.load(missing + row, mask=row < num_choices, other=-1).to(tl.int32)
    other = tl.load(missing + col, mask=col < num_choices, other=-1).to(tl.int32)
    is_same = (own[:, None] == other[None, :]) & (own >= 0)[:, None]
    same = is_same.to(tl.int32)
    # The matrix is its own transpose: sums along either axis are the same numbers, for rows and for columns.
    first = tl.min(tl.where(is_same, col[None, :], CHOICES), 1)
    key = tl.sum(same, 1) * CHOICES - first
    first_of_col = tl.min(tl.where(is_same, row[:, None], CHOICES), 0)
    key_of_col = tl.sum(same, 0) * CHOICES - first_of_col
    leads = first_of_col == col  # one choice of each distinct expert
    rank = tl.sum((leads[None, :] & (key_of_col[None, :] > key[:, None])).to(tl.int32), 1)
    distinct = tl.sum(leads.to(tl.int32), 0)
    number = tl.minimum(tl.load(numbers + distinct), num_slots)
    is_picked = (own >= 0) & (rank < number)
    tl.store(slots + row, tl.where(is_picked, rank, -1), mask=row < num_choices)
    slot = tl.arange(0, SLOTS)
    lands = is_picked[:, None] & (rank[:, None] == slot[None, :])
    tl.store(landing + slot, tl.max(tl.where(lands, own[:, None], -1), 0), mask=slot < num_slots)
    tl.store(counts, tl.load(counts) + distinct)
    tl.store(counts + 1, tl.load(counts + 1) + tl.minimum(number, distinct))
    return tl.where(is_picked, -1, own).to(tl.int64)


@triton.jit
def _copy(source, target, num_words, BLOCK: tl.constexpr) -> Any:
    for start in range(tl.program_id(0) * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < num_words
        tl.store(target + offsets, tl.load(source + offsets, mask=inside), mask=inside)


@triton.jit
def _bring_kernel(
    landing, gate, up, down, arena, gate_words, up_words, down_words, gate_at, up_at, down_at, slot_words,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has a part of one matrix of one slot; without a gate, matrices begin with up."""
    slot = tl.program_id(1)
    matrix = tl.program_id(2) + FIRST
    expert = tl.load(landing + slot).to(tl.int64)
    if expert >= 0:
        target = arena + slot.to(tl.int64) * slot_words
        if matrix == 0:
            _copy(gate + expert * gate_words, target + gate_at, gate_words, BLOCK)
        if matrix == 1:
            _copy(up + expert * up_words, target + up_at, up_words, BLOCK)
        if matrix == 2:
            _copy(down + expert * down_words, target + down_at, down_words, BLOCK)


def bring_experts(
    landing: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    arena: torch.Tensor,
    layout: ExpertLayout,
    part: Literal["all", "inner", "down"] = "all",
) -> None:
    """Copy experts into slots; nothing waits for the device, so that a graph can capture it.

    Args:
        landing: int32 `[num_slots]` on the device: the expert that each slot gets, -1: it stays as it is.
        gate, up, down: uint8, the packed matrices of all experts, one after the other; on the device, or in
            page-locked memory of the CPU.
        arena: uint8 on the device, the slots.
        layout: where matrices lie in a slot; all have the same distance from slot to slot.
        part: of each expert, what is copied: `inner` is gate and up.

    Raises:
        KernelError: a tensor is not as described.
    """
    named = {"gate": (gate, layout.gate), "up": (up, layout.up), "down": (down, layout.down)}
    parts = [_words(name, data, part) for name, (data, part) in named.items() if data is not None and part is not None]
    if len(parts) != (2 if layout.gate is None else 3):
        raise KernelError("Matrices of a gate are given to a layout that has none, or the other way round.")
    if landing.dtype != torch.int32 or landing.ndim != 1 or landing.device != arena.device:
        raise KernelError(f"landing is {describe(landing)}: expected int32 [num_slots] on {arena.device}.")
    if len({part.stride for _, part in named.values() if part is not None}) != 1:
        raise KernelError("The matrices of a slot have different distances from slot to slot: expected one.")
    if layout.arena_bytes(len(landing)) > arena.numel() or arena.dtype != torch.uint8:
        raise KernelError(f"The arena is {describe(arena)}: expected uint8 with room for {len(landing)} slots.")
    first, (a, b, c) = 3 - len(parts), ([parts[0]] if layout.gate is None else []) + parts
    programs = max(1, min(_PROGRAMS, triton.cdiv(max(words for _, words, _ in parts), _BLOCK)))
    first, end = {"all": (first, 3), "inner": (first, 2), "down": (2, 3)}[part]
    _bring_kernel[(programs, len(landing), end - first)](
        landing, a[0], b[0], c[0], arena.view(torch.int32), a[1], b[1], c[1], a[2], b[2], c[2],
        layout.up.stride // _WORD, FIRST=first, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def _words(name: str, data: torch.Tensor, part: MatrixLayout) -> tuple[torch.Tensor, int, int]:
    """Matrices as words; the words from one to the next; where a slot has its own."""
    apart = -(-part.nbytes // 64) * 64
    if data.dtype != torch.uint8 or data.ndim != 1 or not data.is_contiguous() or data.numel() % apart:
        raise KernelError(f"The experts' {name} is {describe(data)}: expected uint8, matrices of {apart} bytes.")
    return data.view(torch.int32), apart // _WORD, part.offset // _WORD
