"""VRAM that experts pass through on their way from DRAM in prefill: a ring of groups of slots, filled by a copy stream.

Matrices of a kind lie side by side in a group as they do in DRAM, so neighbouring experts are one copy per matrix.
Layers may differ in the sizes of their matrices: groups share no bytes, so the experts of two layers can be there.
This module knows neither who chooses experts nor what is computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesaic.engine.gpu.streams import Mark, SideStream
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.grouped_experts import bring
from moesaic.modules.gpu.experts import copy_experts, slot_bytes, slot_layout
from moesaic.placement.vram import STAGING_GROUPS

__all__ = ["StagedGroup", "StagingBuffers", "UploadTables", "runs_of"]

Run = tuple[int, int]
"""The first of some neighbouring experts, and how many they are."""


@dataclass(frozen=True, slots=True)
class StagedGroup:
    """Experts in, or on their way to, slots of a ring.

    Attributes:
        place: which part of the ring.
        runs: what is copied there, one run after the other.
        experts: int `[n]`, those of them that were asked for.
        slots: int `[n]`, where each is in the group.
    """

    place: int
    runs: tuple[Run, ...]
    experts: np.ndarray
    slots: np.ndarray


class UploadTables:
    """Where the experts of each group of a layer are, and their blocks, for kernels.

    Args:
        num_rows: most groups of a layer, and one more.
        num_experts: most experts of a layer.
        device: the GPU.
    """

    def __init__(self, num_rows: int, num_experts: int, device: torch.device) -> None:
        size = num_rows * (2 * num_experts + 1)
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.empty(size, dtype=torch.int32, device=device)

    def upload(self, tables: np.ndarray, first: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring int32 `[n, num_experts]` and `[n, num_experts + 1]` to the GPU, for kernels that come after it.

        What was brought before must have been used when this is called.
        """
        count = tables.size + first.size
        host = self._host.numpy()
        host[: tables.size], host[tables.size : count] = tables.ravel(), first.ravel()
        bring(self._host[:count], self._device[:count])
        return self._device[: tables.size].view(tables.shape), self._device[tables.size : count].view(first.shape)


class StagingBuffers:
    """A ring of groups of slots in VRAM.

    Args:
        routed: the routed experts of every layer, page-locked.
        num_slots: in all groups together.
        device: the GPU.
        memory: uint8 on the GPU, at least `num_slots` times the bytes of the largest expert; its own if None.

    Attributes:
        layouts: of each layer's experts in a group.
        num_groups: groups that can be there at once.
        group: experts of a group, at most.
        num_slots: experts of all groups.
        arenas: uint8, the slots of each group.
        copies: the stream of the copies.
        tables: of the groups of a layer, on their way to the GPU.
    """

    def __init__(
        self,
        routed: Sequence[PackedExperts],
        num_slots: int,
        device: torch.device,
        memory: torch.Tensor | None = None,
    ) -> None:
        self._routed = list(routed)
        most = max(experts.num_experts for experts in routed)
        self.num_groups = min(STAGING_GROUPS, num_slots)
        # Products with a layer's first experts begin before its last are there.
        self.group = min(num_slots // self.num_groups, -(-most // STAGING_GROUPS))
        self.num_slots = self.num_groups * self.group
        self.layouts = [slot_layout(experts, device, by_matrix=self.group) for experts in routed]
        self.device = device
        size = self.group * max(slot_bytes(experts) for experts in routed)
        if memory is None:
            memory = torch.empty(self.num_groups * size, dtype=torch.uint8, device=device)
        self.arenas = memory[: self.num_groups * size].split(size)
        self.copies = SideStream(device)
        self.copies.follow()  # whoever had this memory before may not be through with it
        self._filled = [Mark(device) for _ in range(self.num_groups)]
        self._free = [Mark(device) for _ in range(self.num_groups)]
        self._next = 0
        self.tables = UploadTables(-(-most // self.group) + self.num_groups + 1, most, device)

    def plan(self, experts: np.ndarray, max_gap: int) -> list[StagedGroup]:
        """Give experts of a layer places, the next in the ring.

        Args:
            experts: int `[n]`, ascending.
            max_gap: experts that nobody asked for and that are copied rather than that a copy ends.
        """
        copied, groups = experts, []
        if max_gap > 0 and len(experts):
            copied = np.concatenate([np.arange(first, first + count) for first, count in runs_of(experts, max_gap)])
        for begin in range(0, len(copied), self.group):
            place, self._next = self._next, (self._next + 1) % self.num_groups
            part = copied[begin : begin + self.group]
            at = np.flatnonzero(np.isin(part, experts)) if max_gap > 0 else np.arange(len(part))
            groups.append(StagedGroup(place, tuple(runs_of(part, 0)), part[at], at))
        return groups

    def fill(self, layer: int, group: StagedGroup, begun: Mark | None = None) -> None:
        """Begin to copy a group when its place is free; whoever had the place before must have been left.

        Args:
            layer: whose experts.
            group: planned.
            begun: set in the copy stream when the copies may begin.
        """
        slot, arena = 0, self.arenas[group.place]
        with self.copies.use():
            self._free[group.place].wait()
            if begun is not None:
                begun.set()
            for first, count in group.runs:
                copy_experts(self._routed[layer], first, count, self.layouts[layer], arena, slot)
                slot += count
            self._filled[group.place].set()

    def use(self, group: StagedGroup) -> None:
        """What comes next in the current stream waits until the group is there."""
        self._filled[group.place].wait()

    def leave(self, group: StagedGroup) -> None:
        """When the current stream is here, other experts may come to the group's place."""
        self._free[group.place].set()

    def is_there(self, group: StagedGroup) -> bool:
        """Whether its copies are complete."""
        return self._filled[group.place].is_passed()


def runs_of(experts: np.ndarray, max_gap: int) -> list[Run]:
    """Neighbours among ascending numbers, with gaps of up to `max_gap` numbers between them."""
    if len(experts) == 0:
        return []
    ends = np.flatnonzero(np.diff(experts) > max_gap + 1)
    firsts = experts[np.concatenate([[0], ends + 1])]
    lasts = experts[np.concatenate([ends, [len(experts) - 1]])]
    return [(int(first), int(last - first + 1)) for first, last in zip(firsts, lasts, strict=True)]
