"""Routed experts that a step brings to a GPU instead of computing them on the CPU: how the CPU sends them.

Which experts and in what order is in csrc/uploads.h and docs/architecture.md ("Uploads in decode"). Copies go through
a queue of the device, of which only a function's address is known here; where experts land is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.packed import PackedTensor

__all__ = ["NO_QUEUE", "CopyQueue", "ExpertUploads", "SlotOffsets", "UploadTargets"]

_LINE, _NUMBER = 64, 8  # bytes
_Place = tuple[int, int, int]  # address of the first matrix, bytes of one, offset in a slot


class CopyQueue(NamedTuple):
    """Copies to a device's memory, in order, without waiting for them.

    Attributes:
        function: address of `int (uint64 to, const void *from, size_t num_bytes, void *handle)`, which returns 0 if it
            took note of a copy.
        handle: what it is given.
    """

    function: int
    handle: int


NO_QUEUE = CopyQueue(_native.copy_now_ptr(), 0)
"""For memory of the CPU: a copy is done when it is asked for."""


class SlotOffsets(NamedTuple):
    """Bytes from the beginning of a slot to each matrix; of a gate that is not there, anything."""

    gate: int
    up: int
    down: int


@dataclass(frozen=True, slots=True, eq=False)
class UploadTargets:
    """Memory of the device.

    Attributes:
        arena: uint8, slots one after the other.
        slot_bytes: of a slot.
        slots: int32 `[max_tokens, top_k]`: out, the slot in which the expert of a choice lands; -1: it does not come.
        arrived: int64 `[2]`: out, number of the last request whose gates and ups are there, and whose downs are.
    """

    arena: torch.Tensor
    slot_bytes: int
    slots: torch.Tensor
    arrived: torch.Tensor


class ExpertUploads:
    """Brings experts of a server's layers; see `ExpertServer.serve`.

    Args:
        layers: routed experts of the server's layers, in order; page-locked, where the device is a GPU.
        offsets: of each layer, where matrices lie in a slot.
        targets: where they land.
        queue: of the device.

    Raises:
        KernelError: a layer's experts do not lie one after the other, or a tensor is not as described.
    """

    def __init__(
        self,
        layers: Sequence[PackedExperts],
        offsets: Sequence[SlotOffsets],
        targets: UploadTargets,
        queue: CopyQueue = NO_QUEUE,
    ) -> None:
        slots, arrived = targets.slots, targets.arrived
        if slots.dtype != torch.int32 or slots.ndim != 2 or not slots.is_contiguous():
            raise KernelError("The slots of choices are expected to be int32 [max_tokens, top_k], contiguous.")
        if arrived.dtype != torch.int64 or arrived.shape != (2,):
            raise KernelError("What has arrived is expected to be int64 [2].")
        self._kept = (list(layers), targets)
        self._shape = slots.shape
        record = -(-(_NUMBER + 4 * slots.numel()) // _LINE) * _LINE
        self._records = torch.zeros(len(layers), record, dtype=torch.uint8, pin_memory=slots.is_cuda)
        self.native = _native.ExpertUploads(
            queue.function,
            queue.handle,
            targets.arena.data_ptr(),
            slots.data_ptr(),
            arrived.data_ptr(),
            targets.slot_bytes,
            targets.arena.numel() // targets.slot_bytes,
            slots.shape[0],
            slots.shape[1],
            [_places(experts, offset) for experts, offset in zip(layers, offsets, strict=True)],
            self._records.data_ptr(),
            record,
        )

    @property
    def num_missing(self) -> int:
        """Distinct experts that the CPU was asked for in steps that could bring some, over all layers, so far."""
        return int(self.native.num_missing)

    @property
    def num_brought(self) -> int:
        """Of these, those that were brought."""
        return int(self.native.num_brought)

    @property
    def num_ahead(self) -> int:
        """Experts that were sent before their request, so far."""
        return int(self.native.num_ahead)

    @property
    def num_asked(self) -> int:
        """Of these, those that the request then asked for."""
        return int(self.native.num_asked)

    def last_slots(self, layer: int) -> torch.Tensor:
        """int32 `[max_tokens, top_k]`: the slots that choices of a layer's last request were given; -1: none."""
        size = 4 * self._shape.numel()
        return self._records[layer, _NUMBER : _NUMBER + size].view(torch.int32).view(self._shape)

    def set_numbers(self, numbers: Sequence[int]) -> None:
        """From the next step on: how many experts are brought if 0, 1, ... distinct ones are missing."""
        self.native.set_numbers(list(numbers))

    def bring(self, layer: int, experts: Sequence[int]) -> None:
        """Put experts into the queue, into the first slots, outside of a step."""
        self.native.bring(layer, list(experts))


def _places(experts: PackedExperts, offsets: SlotOffsets) -> tuple[_Place, _Place, _Place]:
    return _place(experts.gate, offsets.gate), _place(experts.up, offsets.up), _place(experts.down, offsets.down)


def _place(part: object, offset: int) -> _Place:
    if part is None:
        return 0, 0, 0
    if not isinstance(part, PackedTensor):
        raise KernelError("Experts that are cut over several memory nodes cannot be brought to a GPU.")
    return part.data.data_ptr(), part.matrix_bytes, offset
