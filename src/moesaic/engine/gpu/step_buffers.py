"""The inputs of decode steps: filled on the CPU, brought to the GPU by one copy, each at fixed addresses.

It knows sequences and hidden states, and nothing of what is computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moesaic.errors import GenerationError
from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.step_input import StepInput

__all__ = ["StepBuffers"]


class StepBuffers:
    """Room for a step of up to `size` sequences, one token each; what is not filled is padding.

    Args:
        size: most sequences.
        max_blocks: most blocks of a sequence.
        hidden_size: width of a hidden state.
        device: where the step is computed.

    Attributes:
        input: on the device.
        hidden: float32 `[size, hidden_size]`, on the device.
    """

    def __init__(self, size: int, max_blocks: int, hidden_size: int, device: torch.device) -> None:
        self._shapes = (
            (torch.int64, (size,)),  # positions
            (torch.int64, (size,)),  # slot mapping
            (torch.int64, (size,)),  # slots of recurrent states
            (torch.float32, (size, hidden_size)),
            (torch.int32, (size, max_blocks)),
            (torch.int32, (size,)),  # lengths
            (torch.int32, (size + 1,)),  # where the tokens of each sequence begin
        )
        nbytes = sum(_padded(dtype, shape) for dtype, shape in self._shapes)
        self._host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        positions, slots, states, self._hidden, tables, lengths, starts = self._views(self._host)
        self._positions, self._slots, self._states = positions.numpy(), slots.numpy(), states.numpy()
        self._tables, self._lengths = tables.numpy(), lengths.numpy()
        starts.copy_(torch.arange(size + 1, dtype=torch.int32))
        self._slots.fill(-1)
        self._states.fill(-1)
        positions, slots, states, self.hidden, tables, lengths, starts = self._views(self._device)
        self.input = StepInput(positions, slots, tables, lengths, starts, states)
        self.upload()

    def append(self, sequences: Sequence[PagedSequence]) -> None:
        """Append one position to each sequence and say where they are.

        Raises:
            GenerationError: the pool is full; all sequences are as before.
        """
        for index, sequence in enumerate(sequences):
            try:
                slot = sequence.append_one()
            except GenerationError:
                for done in sequences[:index]:
                    done.undo(done.length - 1)
                raise
            self._positions[index] = sequence.length - 1
            self._slots[index] = slot
            self._states[index] = sequence.state_slot
            blocks = sequence.table_array
            self._tables[index, : len(blocks)] = blocks
            self._lengths[index] = sequence.length
        if (count := len(sequences)) < len(self._slots):
            self._slots[count:], self._states[count:], self._lengths[count:] = -1, -1, 0

    def rows(self, count: int) -> torch.Tensor:
        """Where the embeddings of so many tokens belong: float32 `[count, hidden_size]` on the CPU."""
        return self._hidden[:count]

    def upload(self) -> None:
        """Bring all of it to the device, in the order of the current stream."""
        self._device.copy_(self._host, non_blocking=True)

    def _views(self, data: torch.Tensor) -> list[torch.Tensor]:
        views, first = [], 0
        for dtype, shape in self._shapes:
            count = int(np.prod(shape)) * dtype.itemsize
            views.append(data[first : first + count].view(dtype).view(shape))
            first += _padded(dtype, shape)
        return views


def _padded(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes, to a multiple of 64."""
    return (int(np.prod(shape)) * dtype.itemsize + 63) // 64 * 64
