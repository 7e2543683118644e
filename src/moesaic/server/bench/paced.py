"""A runner whose steps take a given time, and say when they ended: what is measured behind it is not the model.

The likeliest token of every step is the step's number, so that whoever gets a token knows which step made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from moesaic.kernels import ops
from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.states import StatePool

__all__ = ["PacedPrefill", "PacedRunner"]

_BLOCK_SIZE = 64


class PacedRunner:
    """A `StepRunner` without a model.

    Args:
        step_seconds: that a step of decode takes.
        max_steps: tokens are below this; no more steps are made.
        max_batch: most sequences of a step.
        positions: that a sequence has room for.

    Attributes:
        ended: of each step, `time.perf_counter` when it ended.
    """

    def __init__(self, step_seconds: float, max_steps: int, max_batch: int, positions: int) -> None:
        self._step_seconds = step_seconds
        self.max_batch, self.max_chunk, self.num_layers = max_batch, 1 << 20, 1
        self.vocab_size = max_steps
        self.pool = BlockPool(max_batch * (-(-positions // _BLOCK_SIZE) + 1), _BLOCK_SIZE)
        self.states: StatePool | None = None
        self.on_launch: Callable[[], None] = lambda: None
        self.shares_prefixes = False
        self.shared_positions: int | None = None
        self.ended: list[float] = []

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        return PagedSequence(self.pool)

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """Wait, and give everybody this step's number."""
        for sequence in sequences:
            sequence.append(1)
        self.on_launch()
        time.sleep(self._step_seconds)
        return self.step_logits(len(sequences))

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `StepRunner.decode_likeliest`."""
        return ops.likeliest(self.decode(sequences, token_ids))

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> PacedPrefill:
        """Append tokens; that takes no time."""
        before = [(sequence, sequence.length) for sequence, _ in parts]
        for sequence, ids in parts:
            sequence.append(len(ids))
        return PacedPrefill(self, before)

    def step_logits(self, rows: int) -> torch.Tensor:
        """A step has ended: its number is the likeliest token of all rows."""
        logits = torch.zeros(rows, self.vocab_size)
        logits[:, len(self.ended) % self.vocab_size] = 1
        self.ended.append(time.perf_counter())
        return logits

    def prepare(self, num_sequences: int) -> bool:
        """As `StepRunner.prepare`: there is nothing to prepare."""
        return False

    def expert_uses(self) -> tuple[int, int]:
        """There are no experts."""
        return 0, 0

    def forget(self, sequence: PagedSequence) -> None:
        """Give back what a sequence holds."""
        sequence.free()

    def close(self) -> None:
        """Nothing is held."""


class PacedPrefill:
    """A `PrefillWork` of one layer."""

    def __init__(self, runner: PacedRunner, before: list[tuple[PagedSequence, int]]) -> None:
        self._runner, self._before = runner, before
        self.num_layers_left = 1

    def advance(self, num_layers: int) -> None:
        """Through the one layer."""
        self.num_layers_left = 0

    def logits(self) -> torch.Tensor:
        """The step's number."""
        return self._runner.step_logits(len(self._before))

    def abandon(self) -> None:
        """Take the new positions back."""
        for sequence, length in self._before:
            sequence.truncate(min(length, sequence.length))
        self.num_layers_left = 0
