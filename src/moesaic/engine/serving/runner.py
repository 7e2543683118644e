"""Who computes steps for the scheduler: the interface of runners.

A runner appends tokens to sequences and gives logits. Long work is cut along the layers: a prefill of a large chunk
goes through some layers, then others' decode steps run, then it goes on. So a chunk can be large enough to read every
expert only once without anybody waiting for all of it (layered prefill, arXiv 2510.08055). A runner chooses neither
tokens nor whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.states import StatePool

__all__ = ["PrefillWork", "StepRunner"]


class PrefillWork(Protocol):
    """Prompts, or pieces of them, on their way through the layers. Their sequences hold the new positions already."""

    @property
    def num_layers_left(self) -> int:
        """Layers still to go; each of them as often as there are pieces, if the work is cut into some."""
        ...

    def advance(self, num_layers: int) -> None:
        """Go through so many more layers, or those that are left.

        Memory that runs out may cut the work, so that more layers are left than before.
        """
        ...

    def logits(self) -> torch.Tensor:
        """float32 `[sequences, vocab_size]` on the CPU, of the last token of each; when no layer is left."""
        ...

    def abandon(self) -> None:
        """Take the new positions back; the work is over. Sequences with recurrent states are emptied."""
        ...


class StepRunner(Protocol):
    """Computes steps.

    Attributes:
        pool: blocks of the cache.
        states: recurrent states, if the model has any: then prefixes are not shared.
        max_batch: most sequences of a decode step.
        max_chunk: most tokens of a prefill.
        num_layers: of the model.
        vocab_size: of the logits.
        shares_prefixes: whether a sequence may begin with blocks of another one.
        shared_positions: if so, only so many first positions, and only of prompts that are no longer; None: all.
        on_launch: called in each step of decode once Python has done its part, and what follows goes without its lock.
    """

    pool: BlockPool
    states: StatePool | None
    max_batch: int
    max_chunk: int
    num_layers: int
    vocab_size: int
    shares_prefixes: bool
    shared_positions: int | None
    on_launch: Callable[[], None]

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        ...

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """Append one token to each sequence.

        Returns:
            float32 `[sequences, vocab_size]` on the CPU; the next call may overwrite it.

        Raises:
            GenerationError: the cache is full; nothing was appended.
            ExpertTimeoutError: the step is lost; nothing was appended.
        """
        ...

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `decode`, for who wants no logits but the likeliest next token of each sequence.

        Returns:
            Tokens; -1 where logits are no numbers.
        """
        ...

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> PrefillWork:
        """Append tokens, int64 `[tokens]` on the CPU, to sequences; nothing is computed yet.

        Raises:
            GenerationError: the cache is full; nothing was appended.
        """
        ...

    def prepare(self, num_sequences: int) -> bool:
        """Do a piece of what the first steps of up to so many sequences would have to do; while nobody waits.

        Returns:
            Whether there was one: if so, more may be left.
        """
        ...

    def expert_uses(self) -> tuple[int, int]:
        """Hits and lookups of the cache of experts since the runner was made; zeros without one."""
        ...

    def forget(self, sequence: PagedSequence) -> None:
        """Give back what a sequence holds, in the pool and in the runner."""
        ...

    def close(self) -> None:
        """Give memory back; no further call is allowed."""
        ...
