"""Where the tokens of a step are, for all layers: what kernels on the paged cache read, and how it is made.

It knows sequences and their block tables, and nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moesaic.errors import GenerationError, KernelError
from moesaic.kvcache.paged import PagedSequence

__all__ = ["Span", "StepInput"]

Span = tuple[PagedSequence, int, int]
"""Positions of a sequence: the first, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """Where the tokens of a step are, for all layers. Tokens of a sequence follow each other.

    Attributes:
        positions: int64 `[tokens]`, in its sequence.
        slot_mapping: int64 `[tokens]`: where keys and values go, `block * block_size + offset`; -1: nowhere.
        block_tables: int32 `[seqs, max_blocks]`; what lies behind a sequence's blocks is never read.
        seq_lens: int32 `[seqs]`, new tokens included; 0 for a sequence that is padding.
        query_start: int32 `[seqs + 1]`: tokens `query_start[s]` to `query_start[s + 1]` are of sequence s.
        state_slots: int64 `[seqs]`: where recurrent states are; -1 for a sequence that has none or is padding.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    state_slots: torch.Tensor

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 `[seqs]`: the last token of each sequence, all of which have one."""
        return self.query_start[1:].long() - 1

    @classmethod
    def empty(cls, tokens: int, seqs: int, max_blocks: int, device: torch.device | str = "cpu") -> StepInput:
        """All padding: the buffers of a graph. On the CPU, pinned if there is a GPU to copy to."""
        pin = torch.device(device).type == "cpu" and torch.cuda.is_available()

        def full(value: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device, pin_memory=pin)

        starts = full(0, torch.int32, seqs + 1)
        starts.copy_(torch.tensor(_padding_starts(0, tokens, seqs), dtype=torch.int32))
        return cls(
            full(0, torch.int64, tokens),
            full(-1, torch.int64, tokens),
            full(0, torch.int32, seqs, max_blocks),
            full(0, torch.int32, seqs),
            starts,
            full(-1, torch.int64, seqs),
        )

    @classmethod
    def build(
        cls, parts: Sequence[tuple[PagedSequence, int]], like: StepInput | None = None, max_blocks: int | None = None
    ) -> StepInput:
        """Append new tokens to sequences, and say where they are.

        Args:
            parts: sequences, each with its number of new tokens, at least 1.
            like: pad to the shapes of these buffers (see `copy_into`).
            max_blocks: width of the block tables, without `like`; the longest table's if None.

        Returns:
            Tensors on the CPU, for `copy_into` or `to`.

        Raises:
            GenerationError: the pool is full, or that of states; all sequences are as before.
            KernelError: the step does not fit into `like` or `max_blocks`.
        """
        before = [sequence.length for sequence, _ in parts]
        counts = [count for _, count in parts]
        if min(counts, default=0) < 1:
            raise KernelError(f"a step of {counts} new tokens: expected at least one sequence, and 1 token of each.")
        try:
            slots = [sequence.append_one() if count == 1 else sequence.append(count) for sequence, count in parts]
            spans = [(each, first, each.length) for (each, _), first in zip(parts, before, strict=True)]
            if like is None:
                step = cls.empty(sum(counts), len(parts), _widest(spans) if max_blocks is None else max_blocks)
            else:
                step = cls.empty(len(like.positions), len(like.seq_lens), like.block_tables.shape[1])
            step._fill(spans, slots)
        except (GenerationError, KernelError):
            for (sequence, _), length in zip(parts, before, strict=True):
                sequence.undo(min(length, sequence.length))
            raise
        return step

    @classmethod
    def of(cls, spans: Sequence[Span]) -> StepInput:
        """Say where positions are that sequences have already, as if those behind them were not there.

        Args:
            spans: sequences, each of them once, with the first of the positions and the one behind the last.

        Returns:
            Tensors on the CPU, for `to`: what `build` would have given when the sequences ended there.

        Raises:
            KernelError: there is no position, or a sequence does not have it.
        """
        counts = [end - first for _, first, end in spans]
        if min(counts, default=0) < 1:
            raise KernelError(f"a step of {counts} tokens: expected at least one sequence, and 1 token of each.")
        step = cls.empty(sum(counts), len(spans), _widest(spans))
        step._fill(spans, [sequence.slots(first, end) for sequence, first, end in spans])
        return step

    def _fill(self, spans: Sequence[Span], slots: Sequence[int | torch.Tensor]) -> None:
        num_tokens, widest = sum(end - first for _, first, end in spans), _widest(spans)
        room = (len(self.positions), *self.block_tables.shape)
        if any(have > most for have, most in zip((num_tokens, len(spans), widest), room, strict=True)):
            raise KernelError(
                f"a step of {num_tokens} tokens of {len(spans)} sequences of up to {widest} blocks does not fit "
                f"into buffers for {room[0]}, {room[1]} and {room[2]}."
            )
        starts = [0]
        # Through numpy: tensors would take several times as long for the few numbers of each of many sequences.
        positions, mapping, tables = self.positions.numpy(), self.slot_mapping.numpy(), self.block_tables.numpy()
        lengths, states = self.seq_lens.numpy(), self.state_slots.numpy()
        for index, ((sequence, start, end), own_slots) in enumerate(zip(spans, slots, strict=True)):
            first, last = starts[-1], starts[-1] + end - start
            positions[first:last] = np.arange(start, end)
            mapping[first:last] = own_slots
            table = sequence.table_array[: sequence.pool.blocks_for(end)]
            tables[index, : len(table)] = table
            lengths[index] = end
            states[index] = sequence.state_slot
            starts.append(last)
        starts += _padding_starts(num_tokens, room[0], room[1] - len(spans))[1:]
        self.query_start.copy_(torch.tensor(starts, dtype=torch.int32))

    def copy_into(self, fixed: StepInput) -> None:
        """Copy to buffers of the same shapes (`build(..., like=fixed)`) in the order of the current stream.

        Raises:
            KernelError: shapes differ.
        """
        for field in fields(self):
            source, target = getattr(self, field.name), getattr(fixed, field.name)
            if source.shape != target.shape:
                raise KernelError(
                    f"{field.name} is {list(source.shape)}, its buffer {list(target.shape)}: build with like=buffers."
                )
            target.copy_(source, non_blocking=True)

    def to(self, device: torch.device | str) -> StepInput:
        """The same on a device."""
        return StepInput(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def _widest(spans: Sequence[Span]) -> int:
    """Most blocks that a sequence has up to the end of its span."""
    return max(sequence.pool.blocks_for(end) for sequence, _, end in spans)


def _padding_starts(first: int, num_tokens: int, num_seqs: int) -> list[int]:
    """Boundaries that give tokens `first` to `num_tokens`, which are padding, evenly to sequences that are padding.

    Raises:
        KernelError: there are such tokens but no such sequence: kernels write only tokens that some sequence has.
    """
    rest = num_tokens - first
    if rest > 0 and num_seqs == 0:
        raise KernelError(f"{rest} tokens of padding, but no sequence of padding that they could belong to.")
    return [first + rest * index // max(1, num_seqs) for index in range(num_seqs + 1)]
