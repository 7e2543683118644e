"""Experts in slots on a GPU: where a slot's bytes are, how they get there, and what is computed from them.

A slot holds one expert: its packed matrices one after the other, as they lie in DRAM, each on a multiple of 64 bytes.
This module does not know which experts deserve a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.errors import KernelError
from moesaic.kernels import PackedTensor, SlicedTensor
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.experts import (
    MAX_DECODE_TOKENS,
    ExpertLayout,
    MatrixLayout,
    experts_decode,
    experts_grouped,
)

__all__ = ["ResidentExperts", "SlotLayout", "copy_expert", "page_lock", "slot_layout"]


@dataclass(frozen=True, slots=True, eq=False)
class SlotLayout:
    """The bytes of one expert of a layer.

    Attributes:
        kernel: what the kernels have to know.
        offsets: of gate (if there is one), up and down in a slot, in bytes.
        nbytes: of all of them.
    """

    kernel: ExpertLayout
    offsets: tuple[int, ...]
    nbytes: int

    def compute(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        arena: torch.Tensor,
        slot_bytes: int,
        num_slots: int,
    ) -> torch.Tensor:
        """Weighted sum of the experts in slots.

        Args:
            hidden: float32 `[tokens, hidden_size]`.
            slots: int32 `[tokens, top_k]`, -1: not here.
            experts: int64 `[tokens, top_k]`, which experts these are.
            weights: float32 `[tokens, top_k]`.
            arena: uint8, the slots.
            slot_bytes: from one slot to the next.
            num_slots: how many.

        Returns:
            float32 `[tokens, hidden_size]`.
        """
        if len(hidden) <= MAX_DECODE_TOKENS:
            return experts_decode(hidden, slots, experts, weights, arena, slot_bytes, self.kernel)
        return experts_grouped(hidden, slots, experts, weights, arena, slot_bytes, self.kernel, num_slots)

    def accumulate(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        arena: torch.Tensor,
        slot_bytes: int,
        num_slots: int,
        total: torch.Tensor,
    ) -> None:
        """Add what `compute` gives for many tokens to `total`."""
        experts_grouped(
            hidden, slots, experts, weights, arena, slot_bytes, self.kernel, num_slots, out=total, accumulate=True
        )


def slot_layout(experts: PackedExperts, device: torch.device) -> SlotLayout:
    """The layout of a slot for these experts; biases are copied to the GPU."""
    offsets: list[int] = []
    matrices: list[MatrixLayout | None] = []
    end = 0
    biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
    for part, bias in zip((experts.gate, experts.up, experts.down), biases, strict=True):
        if part is None:
            matrices.append(None)
            continue
        offsets.append(end)
        on_device = None if bias is None else bias.to(device)
        matrices.append(MatrixLayout(part.format, end, part.rows, part.cols, on_device))
        end += sum(piece.matrix_bytes for piece in part.slices)
    gate, up, down = matrices
    assert up is not None and down is not None
    return SlotLayout(ExpertLayout(gate, up, down, experts.activation), tuple(offsets), end)


def copy_expert(experts: PackedExperts, expert: int, layout: SlotLayout, slot: torch.Tensor) -> None:
    """Copy one expert into the beginning of `slot`, in the order of the current stream.

    Args:
        experts: in DRAM; page-locked, or the calling thread waits.
        expert: which.
        layout: of a slot for these experts.
        slot: uint8 on the GPU, at least `layout.nbytes`.
    """
    parts = [part for part in (experts.gate, experts.up, experts.down) if part is not None]
    for part, offset in zip(parts, layout.offsets, strict=True):
        _copy_matrix(part, expert, slot[offset:])


def _copy_matrix(part: PackedTensor | SlicedTensor, index: int, target: torch.Tensor) -> None:
    if isinstance(part, PackedTensor):
        first = index * part.matrix_bytes
        target[: part.matrix_bytes].copy_(part.data[first : first + part.matrix_bytes], non_blocking=True)
        return
    num_panels = -(-part.rows // 16)
    whole = 16 * part.format.row_bytes(part.cols)
    first = 0
    for piece in part.slices:
        source = piece.data[index * piece.matrix_bytes :]
        width = 16 * part.format.row_bytes(piece.cols)
        if part.axis == "rows":  # panels follow each other
            count = -(-piece.rows // 16) * width
            target[first : first + count].copy_(source[:count], non_blocking=True)
            first += count
        else:  # every panel has its next columns
            view = target[: num_panels * whole].view(num_panels, whole)[:, first : first + width]
            view.copy_(source[: num_panels * width].view(num_panels, width), non_blocking=True)
            first += width


def page_lock(experts: PackedExperts) -> None:
    """Lock the experts' memory, so that a GPU copies from it while the CPU goes on.

    Raises:
        KernelError: the system refuses.
    """
    for part in (experts.gate, experts.up, experts.down):
        for piece in () if part is None else part.slices:
            status = torch.cuda.cudart().cudaHostRegister(piece.data.data_ptr(), piece.nbytes, 0)
            if int(status) != 0:
                raise KernelError(
                    f"{piece.nbytes / 2**30:.2f} GiB of experts cannot be page-locked ({status}): raise the limit of "
                    "locked memory (ulimit -l)."
                )


@dataclass(frozen=True, slots=True, eq=False)
class ResidentExperts:
    """All experts of a layer, or a dense MLP as one, on the GPU for ever: expert i is in slot i.

    Attributes:
        layout: of a slot.
        arena: uint8, the slots.
        table: int32 `[num_experts]`, 0, 1, 2, ...
    """

    layout: SlotLayout
    arena: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, experts: PackedExperts, device: torch.device) -> ResidentExperts:
        """A copy."""
        layout = slot_layout(experts, device)
        arena = torch.empty(experts.num_experts * layout.nbytes, dtype=torch.uint8, device=device)
        for expert in range(experts.num_experts):
            copy_expert(experts, expert, layout, arena[expert * layout.nbytes :])
        return cls(layout, arena, torch.arange(experts.num_experts, dtype=torch.int32, device=device))

    def compute(
        self, hidden: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `SlotLayout.compute`."""
        return self.layout.compute(hidden, slots, experts, weights, self.arena, self.layout.nbytes, len(self.table))

    def of_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """A dense MLP on float32 `[tokens, hidden_size]`."""
        tokens, device = len(hidden), hidden.device
        slots = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
        experts = torch.zeros(tokens, 1, dtype=torch.int64, device=device)
        return self.compute(hidden, slots, experts, torch.ones(tokens, 1, device=device))
