"""Experts in slots on a GPU: where a slot's bytes are, how they get there, and what is computed from them.

A slot holds one expert: its packed matrices as they lie in DRAM, each on a multiple of 64 bytes, one after the other or
each beside those of the neighbouring slots. This module does not know which experts deserve a slot.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

import torch

from moesaic.errors import KernelError
from moesaic.kernels import PackedTensor, SlicedTensor
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.experts import ExpertLayout, MatrixLayout
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS, experts_decode, takes_pairs
from moesaic.kernels.triton.grouped_experts import ExpertPairs

__all__ = ["ResidentExperts", "SlotLayout", "copy_experts", "page_lock", "slot_bytes", "slot_layout"]


@dataclass(frozen=True, slots=True, eq=False)
class SlotLayout:
    """Where the experts of a layer lie in slots.

    Attributes:
        kernel: what the kernels have to know.
        num_experts: of the layer.
        nbytes: of all matrices of an expert.
    """

    kernel: ExpertLayout
    num_experts: int
    nbytes: int

    def compute(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        arena: torch.Tensor,
        table: torch.Tensor,
        num_slots: int,
    ) -> torch.Tensor:
        """Weighted sum of the experts in slots.

        Args:
            hidden: float32 `[tokens, hidden_size]`.
            slots: int32 `[tokens, top_k]`, -1: not here.
            experts: int64 `[tokens, top_k]`, which experts these are.
            weights: float32 `[tokens, top_k]`.
            arena: uint8, the slots.
            table: int32 `[num_experts]`, the slot of each expert or -1; what `slots` was looked up in.
            num_slots: how many slots there are.

        Returns:
            float32 `[tokens, hidden_size]`.
        """
        if takes_pairs(len(experts), experts.shape[1], self.num_experts):
            return experts_decode(hidden, slots, experts, weights, arena, self.kernel)
        pairs = self.pairs(hidden, experts, weights)
        pairs.multiply(arena, self.kernel, num_slots, pairs.blocks(table))
        return pairs.sum(table)

    def pairs(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> ExpertPairs:
        """Many tokens, ready for products with these experts wherever they are; arguments as for `compute`."""
        return ExpertPairs(hidden, experts, weights, self.num_experts, self.kernel)


def slot_bytes(experts: PackedExperts) -> int:
    """Bytes of one expert: its packed matrices, each a multiple of 64."""
    return sum(_matrix_bytes(part) for part in _parts(experts))


def slot_layout(
    experts: PackedExperts, device: torch.device, stride: int | None = None, by_matrix: int | None = None
) -> SlotLayout:
    """The layout of slots for these experts; biases are copied to the GPU.

    Args:
        experts: of the layer.
        device: the GPU.
        stride: bytes from slot to slot; as many as an expert has if None.
        by_matrix: if given, the gates of so many slots lie one after the other, then all ups, then all downs, as in
            DRAM: a copy of neighbours is one of each.
    """
    total = slot_bytes(experts)
    named = {"gate": experts.gate, "up": experts.up, "down": experts.down}
    biases = {"gate": experts.gate_bias, "up": experts.up_bias, "down": experts.down_bias}
    matrices: dict[str, MatrixLayout] = {}
    end = 0
    for name, part in named.items():
        if part is None:
            continue
        bias, size = biases[name], _matrix_bytes(part)
        on_device = None if bias is None else bias.to(device)
        apart = size if by_matrix is not None else total if stride is None else stride
        matrices[name] = MatrixLayout(part.format, end, apart, part.rows, part.cols, on_device)
        end += size * (1 if by_matrix is None else by_matrix)
    kernel = ExpertLayout(matrices.get("gate"), matrices["up"], matrices["down"], experts.activation)
    return SlotLayout(kernel, experts.num_experts, total)


def copy_experts(
    experts: PackedExperts, first: int, count: int, layout: SlotLayout, arena: torch.Tensor, slot: int
) -> None:
    """Copy neighbours into neighbouring slots, in the order of the current stream.

    Args:
        experts: in DRAM; page-locked, or the calling thread waits.
        first: the first of them.
        count: how many.
        layout: of slots for these experts.
        arena: uint8 on the GPU, the slots.
        slot: where the first goes.
    """
    kernel = layout.kernel
    matrices = [matrix for matrix in (kernel.gate, kernel.up, kernel.down) if matrix is not None]
    for part, matrix in zip(_parts(experts), matrices, strict=True):
        begin = matrix.offset + slot * matrix.stride
        if isinstance(part, PackedTensor) and (count == 1 or matrix.stride == part.matrix_bytes):
            size = count * part.matrix_bytes
            arena.narrow(0, begin, size).copy_(part.data.narrow(0, first * part.matrix_bytes, size), non_blocking=True)
            continue
        for index in range(count):
            _copy_matrix(part, first + index, arena[begin + index * matrix.stride :])


def _parts(experts: PackedExperts) -> list[PackedTensor | SlicedTensor]:
    return [part for part in (experts.gate, experts.up, experts.down) if part is not None]


def _matrix_bytes(part: PackedTensor | SlicedTensor) -> int:
    return sum(piece.matrix_bytes for piece in part.slices)


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
    """Lock the experts' memory for as long as it lives, so that a GPU copies from it while the CPU goes on.

    Raises:
        KernelError: the system refuses.
    """
    for part in _parts(experts):
        for piece in part.slices:
            _lock(piece.data)


def _lock(data: torch.Tensor) -> None:
    cudart = torch.cuda.cudart()
    address = data.data_ptr()
    status = cudart.cudaHostRegister(address, data.nbytes, 0)
    if int(status) != 0:
        # The runtime remembers the failure until somebody asks, and somebody else would be blamed for it.
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)
        raise KernelError(
            f"{data.nbytes / 2**30:.2f} GiB of experts cannot be page-locked ({status}): raise the limit of locked "
            "memory (ulimit -l)."
        )
    # Before the memory is given back: whatever gets its addresses next could not be locked, nor copied.
    weakref.finalize(data, cudart.cudaHostUnregister, address).atexit = False


@dataclass(frozen=True, slots=True, eq=False)
class _AllChooseOne:
    """Each token chooses expert 0, which is in slot 0, and weighs it 1."""

    slots: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, tokens: int, device: torch.device) -> _AllChooseOne:
        return cls(
            torch.zeros(tokens, 1, dtype=torch.int32, device=device),
            torch.zeros(tokens, 1, dtype=torch.int64, device=device),
            torch.ones(tokens, 1, device=device),
        )

    def first(self, tokens: int) -> _AllChooseOne:
        return _AllChooseOne(self.slots[:tokens], self.experts[:tokens], self.weights[:tokens])


@dataclass(frozen=True, slots=True, eq=False)
class ResidentExperts:
    """All experts of a layer, or a dense MLP as one, on the GPU for ever: expert i is in slot i.

    Attributes:
        layout: of a slot.
        arena: uint8, the slots.
        table: int32 `[num_experts]`, 0, 1, 2, ...
        all_of_few: what a few tokens choose that all choose expert 0 and weigh it 1; see `of_all`.
    """

    layout: SlotLayout
    arena: torch.Tensor
    table: torch.Tensor
    all_of_few: _AllChooseOne

    @classmethod
    def of(cls, experts: PackedExperts, device: torch.device) -> ResidentExperts:
        """A copy."""
        layout = slot_layout(experts, device, by_matrix=experts.num_experts)
        arena = torch.empty(experts.num_experts * layout.nbytes, dtype=torch.uint8, device=device)
        copy_experts(experts, 0, experts.num_experts, layout, arena, 0)
        table = torch.arange(experts.num_experts, dtype=torch.int32, device=device)
        return cls(layout, arena, table, _AllChooseOne.of(MAX_DECODE_TOKENS, device))

    def compute(
        self, hidden: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `SlotLayout.compute`."""
        return self.layout.compute(hidden, slots, experts, weights, self.arena, self.table, len(self.table))

    def of_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """A dense MLP on float32 `[tokens, hidden_size]`."""
        tokens = len(hidden)
        few = tokens <= MAX_DECODE_TOKENS
        choice = self.all_of_few.first(tokens) if few else _AllChooseOne.of(tokens, hidden.device)
        return self.compute(hidden, choice.slots, choice.experts, choice.weights)
