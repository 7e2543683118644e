"""Steps of a model on a GPU: decode steps in batches that graphs are captured for, prompts layer by layer.

It only puts `engine.gpu`'s runner behind the scheduler's interface. It needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch

from moesaic.engine.gpu.partial_prefill import PartialPrefill
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.kvcache.paged import PagedSequence

__all__ = ["GpuStepRunner"]

Result = TypeVar("Result")


class GpuStepRunner:
    """A `StepRunner` over a `ModelRunner`.

    Args:
        runner: who computes.
        max_batch: most sequences of a step, which goes in batches of the runner's; with recurrent states no more than
            there are.
        on_close: called when it is closed.

    Attributes: as `StepRunner`, and
        max_positions: that a sequence may have.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_batch: int = 64,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._runner, decoder, self._on_close = runner, runner.decoder, on_close
        self.pool, self.states = runner.pool, runner.states
        self.max_batch = max_batch if runner.states is None else min(max_batch, runner.states.num_slots)
        self.max_chunk, self.max_positions = runner.options.max_chunk, runner.max_positions
        self.num_layers = len(decoder.layers) + (0 if decoder.tail is None else decoder.tail.num_layers)
        self.vocab_size = decoder.vocab_size
        self.shares_prefixes = runner.states is None and decoder.tail is None  # what a tail keeps is in no block
        self.shared_positions: int | None = None
        self._num_sequences = 0  # that will all decode one day

    @property
    def on_launch(self) -> Callable[[], None]:
        """As `StepRunner`."""
        return self._runner.steps.on_launch

    @on_launch.setter
    def on_launch(self, call: Callable[[], None]) -> None:
        self._runner.steps.on_launch = call

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        self._num_sequences += 1
        return self._runner.new_sequence()

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """As `StepRunner.decode`."""

        def step(some: Sequence[PagedSequence], tokens: Sequence[int]) -> torch.Tensor:
            rows = self._runner.decode(some, tokens, to_host=True)
            return rows if len(some) == len(sequences) else rows.clone()

        logits = self._in_batches(step, sequences, token_ids)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `StepRunner.decode_likeliest`; logits stay on the GPU."""
        return list(chain.from_iterable(self._in_batches(self._runner.decode_likeliest, sequences, token_ids)))

    def _in_batches(
        self,
        step: Callable[[Sequence[PagedSequence], Sequence[int]], Result],
        sequences: Sequence[PagedSequence],
        token_ids: Sequence[int],
    ) -> list[Result]:
        """What a step of each batch gives; all of it or nothing."""
        size, found = self._runner.options.max_batch, list[Result]()
        self._runner.steps.graphs.expected = self._num_sequences
        try:
            for first in range(0, len(sequences), size):
                found.append(step(sequences[first : first + size], token_ids[first : first + size]))
        except BaseException:
            for sequence in sequences[: len(found) * size]:  # the others are as they were, by the runner's care
                sequence.truncate(0 if sequence.is_recurrent else sequence.length - 1)
            raise
        return found

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> GpuPrefill:
        """As `StepRunner.start_prefill`."""
        return GpuPrefill(self._runner.start_prefill(parts))

    def prepare(self, num_sequences: int) -> bool:
        """As `StepRunner.prepare`; when graphs are there, the cache gets the experts that steps had no time to copy."""
        if self._runner.steps.prepare(num_sequences):
            return True
        cache = self._runner.slots.cache
        return cache is not None and cache.catch_up()

    def expert_uses(self) -> tuple[int, int]:
        """As `StepRunner.expert_uses`."""
        cache = self._runner.slots.cache
        if cache is None:
            return 0, 0
        return int(cache.policy.hits.sum()), int(cache.policy.uses.sum())

    def forget(self, sequence: PagedSequence) -> None:
        """As `StepRunner.forget`."""
        self._num_sequences -= 1
        sequence.free()

    def close(self) -> None:
        """As `StepRunner.close`; the model keeps what it needs for `generate()`."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


class GpuPrefill:
    """A `PrefillWork`: the GPU's, with logits on the CPU."""

    def __init__(self, work: PartialPrefill) -> None:
        self._work = work
        self.advance, self.abandon = work.advance, work.abandon

    @property
    def num_layers_left(self) -> int:
        """As `PrefillWork`."""
        return self._work.num_layers_left

    def logits(self) -> torch.Tensor:
        """As `PrefillWork`."""
        return self._work.logits().cpu()
