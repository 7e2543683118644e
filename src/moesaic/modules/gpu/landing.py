"""Slots on a GPU in which experts land that the CPU sends in the middle of a step, and what is computed from them.

A layer's experts stay there until the next layer's come: the slots belong to a step, not to experts. This module does
not know which experts come, nor how many are worth while.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.kernels import PackedTensor
from moesaic.kernels.expert_uploads import NO_QUEUE, CopyQueue, ExpertUploads, SlotOffsets, UploadTargets
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS, experts_down, experts_inner
from moesaic.modules.gpu.experts import SlotLayout, slot_bytes, slot_layout
from moesaic.modules.gpu.step import Routed

__all__ = ["LandingSlots", "why_not_sent"]


class LandingSlots:
    """Slots for experts of any layer.

    Args:
        routed: the routed experts of every layer, in DRAM; page-locked, where the device is a GPU.
        num_slots: how many experts of a layer can be there at once.
        top_k: experts per token.
        device: the GPU.

    Attributes:
        num_slots: as given.
        max_distinct: experts of a layer that a step can choose.
        inner_arrived, down_arrived: int64 `[1]`, on the device: number of the last request whose gates and ups are
            there, and whose downs are.
    """

    def __init__(self, routed: Sequence[PackedExperts], num_slots: int, top_k: int, device: torch.device) -> None:
        self.routed, self.num_slots = list(routed), num_slots
        self._slot_bytes = max(slot_bytes(experts) for experts in routed)
        self._layouts: list[SlotLayout] = [slot_layout(experts, device, stride=self._slot_bytes) for experts in routed]
        self._arena = torch.empty(self.num_slots * self._slot_bytes, dtype=torch.uint8, device=device)
        self.max_distinct = MAX_DECODE_TOKENS * top_k
        self._slots = torch.full((MAX_DECODE_TOKENS, top_k), -1, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(2, dtype=torch.int64, device=device)
        self.inner_arrived, self.down_arrived = self._arrived[:1], self._arrived[1:]

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._arena.device

    @property
    def nbytes(self) -> int:
        """Bytes of VRAM that slots take."""
        return self._arena.numel()

    def uploads(self, queue: CopyQueue = NO_QUEUE) -> ExpertUploads:
        """By which the CPU sends experts here, through a queue of this device."""
        offsets = []
        for layout in self._layouts:
            gate, up, down = layout.kernel.gate, layout.kernel.up, layout.kernel.down
            offsets.append(SlotOffsets(0 if gate is None else gate.offset, up.offset, down.offset))
        targets = UploadTargets(self._arena, self._slot_bytes, self._slots, self._arrived)
        return ExpertUploads(self.routed, offsets, targets, queue)

    def restart(self) -> None:
        """Requests are counted anew after a failure."""
        self._arrived.zero_()

    def inner(self, routed: Routed) -> torch.Tensor:
        """What `down` takes, when gates and ups have arrived: see `experts_inner`."""
        slots = self._slots[: len(routed.hidden)]
        return experts_inner(routed.hidden, slots, routed.chosen, self._arena, self._layouts[routed.layer].kernel)

    def down(self, inner: torch.Tensor, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """`total` (or nothing) plus the weighted sum of the experts that landed: float32 `[tokens, hidden_size]`."""
        slots, kernel = self._slots[: len(routed.hidden)], self._layouts[routed.layer].kernel
        add = total is not None
        return experts_down(inner, slots, routed.chosen, routed.weights, self._arena, kernel, total, accumulate=add)


def why_not_sent(routed: Sequence[PackedExperts]) -> str:
    """Why the CPU cannot send these experts as they lie; nothing if it can."""
    for experts in routed:
        if not all(
            isinstance(part, PackedTensor) for part in (experts.gate, experts.up, experts.down) if part is not None
        ):
            return "experts are cut over several memory nodes"
    return ""
