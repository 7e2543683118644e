"""Slots on a GPU in which experts land that a step brings to itself from DRAM, and what is computed from them.

A layer's experts stay there until the next layer's come: the slots belong to a step, not to experts. This module does
not know how many are worth while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from moesaic.kernels import PackedTensor
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS, experts_down, experts_inner
from moesaic.kernels.triton.uploads import MAX_PICKED, Picks, bring_experts
from moesaic.modules.gpu.experts import SlotLayout, slot_bytes, slot_layout
from moesaic.modules.gpu.step import Routed

__all__ = ["LandingSlots", "why_not_readable"]


class LandingSlots:
    """Slots for experts of any layer, and the tables by which kernels choose what lands there.

    Args:
        routed: the routed experts of every layer, in DRAM; page-locked, where the device is a GPU.
        num_slots: how many experts of a layer can be there at once, at most MAX_PICKED.
        top_k: experts per token.
        device: the GPU.

    Attributes:
        num_slots: as given.
        max_distinct: experts of a layer that a step can choose.
        numbers: int32 `[max_distinct + 1]`, on the device: how many are brought of so many that are missing.
        counts: int64 `[2]`, on the device: distinct experts that were missing so far, and brought.
    """

    def __init__(self, routed: Sequence[PackedExperts], num_slots: int, top_k: int, device: torch.device) -> None:
        self._routed, self.num_slots = list(routed), min(num_slots, MAX_PICKED)
        size = max(slot_bytes(experts) for experts in routed)
        self._layouts: list[SlotLayout] = [slot_layout(experts, device, stride=size) for experts in routed]
        self._arena = torch.empty(self.num_slots * size, dtype=torch.uint8, device=device)
        self.max_distinct = MAX_DECODE_TOKENS * top_k
        self.numbers = torch.zeros(self.max_distinct + 1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        most = max(experts.num_experts for experts in routed)
        self._nowhere = torch.full((most,), -1, dtype=torch.int32, device=device)
        self._landing = torch.full((self.num_slots,), -1, dtype=torch.int32, device=device)
        self._slots = torch.full((MAX_DECODE_TOKENS, top_k), -1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of VRAM that slots take."""
        return self._arena.numel()

    def nowhere(self, layer: int) -> torch.Tensor:
        """int32 `[num_experts]`, -1: a table for routers where no cache has one, by which padding misses nothing."""
        return self._nowhere[: self._routed[layer].num_experts]

    def picks(self, num_tokens: int) -> Picks:
        """What the hand-off of a step of so many tokens needs; the next layer overwrites what it chose."""
        return Picks(self.numbers, self._landing, self._slots[:num_tokens], self.counts)

    def bring(
        self, layer: int, landing: torch.Tensor | None = None, part: Literal["all", "inner", "down"] = "all"
    ) -> None:
        """Copy experts of a layer into slots: those that the hand-off chose, or `landing` (see `bring_experts`)."""
        experts = self._routed[layer]
        gate, up, down = (_data(part) for part in (experts.gate, experts.up, experts.down))
        assert up is not None and down is not None
        chosen = self._landing if landing is None else landing
        bring_experts(chosen, gate, up, down, self._arena, self._layouts[layer].kernel, part)

    def inner(self, routed: Routed) -> torch.Tensor:
        """What `down` takes, when the inner part of what lands is there: see `experts_inner`."""
        slots = self._slots[: len(routed.hidden)]
        return experts_inner(routed.hidden, slots, routed.chosen, self._arena, self._layouts[routed.layer].kernel)

    def down(self, inner: torch.Tensor, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """`total` (or nothing) plus the weighted sum of the experts that landed: float32 `[tokens, hidden_size]`."""
        slots, kernel = self._slots[: len(routed.hidden)], self._layouts[routed.layer].kernel
        add = total is not None
        return experts_down(inner, slots, routed.chosen, routed.weights, self._arena, kernel, total, accumulate=add)


def why_not_readable(routed: Sequence[PackedExperts]) -> str:
    """Why a GPU cannot read these experts where they lie; nothing if it can."""
    for experts in routed:
        if not all(
            isinstance(part, PackedTensor) for part in (experts.gate, experts.up, experts.down) if part is not None
        ):
            return "experts are cut over several memory nodes"
    return ""


def _data(part: object) -> torch.Tensor | None:
    return part.data if isinstance(part, PackedTensor) else None
