"""Recurrent states of sequences: what a layer of linear attention keeps instead of keys and values of all positions.

A sequence has a slot, whose number is the same in all layers. `StatePool` hands the slots out; `StateLayer` is the
memory of a layer. Nothing is ever cleared: who computes a sequence's first position begins with zeros and does not read
its slot. A state cannot go back to an earlier position, unless somebody has kept a copy of it (`SavedStates`). It does
not know what computes states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moesaic.errors import GenerationError, KernelError

__all__ = ["SavedStates", "StateLayer", "StatePool", "StateShape"]

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a layer stores per sequence, in float32.

    Attributes:
        conv_width: last inputs of a causal convolution that are kept, one less than it is long.
        conv_channels: of the convolution.
        heads: of values.
        key_dim: rows of a head's matrix.
        value_dim: its columns.
    """

    conv_width: int
    conv_channels: int
    heads: int
    key_dim: int
    value_dim: int

    @property
    def nbytes(self) -> int:
        """Of one sequence."""
        numbers = self.conv_width * self.conv_channels + self.heads * self.key_dim * self.value_dim
        return numbers * _FLOAT_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class StateLayer:
    """The memory of one layer, uninitialised.

    Attributes:
        conv: float32 `[slots, conv_width, conv_channels]`, oldest input first.
        recurrent: float32 `[slots, heads, key_dim, value_dim]`.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor

    @classmethod
    def empty(cls, shape: StateShape, num_slots: int, device: torch.device | str = "cpu") -> StateLayer:
        """Allocate."""
        return cls(
            torch.empty(num_slots, shape.conv_width, shape.conv_channels, device=device),
            torch.empty(num_slots, shape.heads, shape.key_dim, shape.value_dim, device=device),
        )

    def copy(self, source: int, target: int) -> None:
        """Give a slot the contents of another one."""
        for states in (self.conv, self.recurrent):
            states[target].copy_(states[source])


class SavedStates:
    """Copies of some slots in the CPU's memory, page-locked for a GPU, for a step that may have to be undone.

    They are made in the order of the current stream, and nobody waits for them.

    Args:
        layers: of all of which the slots are kept.
        slots: which.
    """

    def __init__(self, layers: Iterable[StateLayer], slots: Sequence[int]) -> None:
        self._kept = [
            (states[slot], torch.empty(states.shape[1:], pin_memory=states.is_cuda))
            for layer in layers
            for slot in slots
            for states in (layer.conv, layer.recurrent)
        ]
        for states, kept in self._kept:
            kept.copy_(states, non_blocking=True)

    def restore(self) -> None:
        """Give the slots back what they had, in the order of the current stream."""
        for states, kept in self._kept:
            states.copy_(kept, non_blocking=True)


class StatePool:
    """Hands out the numbers of slots.

    Args:
        num_slots: of every layer; so many sequences can be there at once.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise KernelError(f"a pool of {num_slots} states: expected at least 1.")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # taken from the end

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def take(self) -> int:
        """A slot.

        Raises:
            GenerationError: all are taken.
        """
        if not self._free:
            raise GenerationError(
                f"All {self.num_slots} recurrent states are taken: this model runs at most so many sequences (rows of "
                "a batch times beams) at once. Use a smaller batch or fewer beams, or wait for other requests."
            )
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Nobody needs the slot any more."""
        if not 0 <= slot < self.num_slots or slot in self._free:
            raise KernelError(f"state {slot} is given back, but no sequence has it.")
        self._free.append(slot)
