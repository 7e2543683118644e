"""A chunk of prompts and the pieces that it is cut into: which tokens of which sequences go through layers together.

A piece is neighbouring tokens of the chunk. Sequences have the positions of the whole chunk from the beginning, and a
piece is computed as if what comes behind it were not there. It does not know why a chunk is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.step_input import Span, StepInput

__all__ = ["Piece", "PromptChunk", "WantedLogits"]

WantedLogits = Literal["last", "all", "none"]
"""Of a chunk: of the last token of each sequence, of all tokens, or nobody's."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens that go through the layers together.

    Attributes:
        spans: where they are.
        token_ids: int64 `[tokens]` on the CPU.
        rows: of these tokens, those behind which something is asked for, ascending; None: all.
    """

    spans: tuple[Span, ...]
    token_ids: torch.Tensor
    rows: tuple[int, ...] | None

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return len(self.token_ids)

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - first for _, first, end in self.spans]

    @property
    def asks_some(self) -> bool:
        """Whether something is asked for behind some of the tokens only, or behind none."""
        return self.rows is not None and len(self.rows) < self.num_tokens

    @property
    def recurrent_slots(self) -> list[int]:
        """Of sequences that go on with a recurrent state, where that is."""
        return [sequence.state_slot for sequence, first, _ in self.spans if first and sequence.is_recurrent]

    def step_input(self) -> StepInput:
        """Where the tokens are, on the CPU."""
        return StepInput.of(self.spans)


class PromptChunk:
    """New tokens of sequences.

    Args:
        parts: sequences, each once, with the position of its first new token, and these: int64 `[tokens]` on the CPU.
        wanted: whose logits are asked for.

    Attributes:
        num_tokens: of all sequences.
    """

    def __init__(self, parts: Sequence[tuple[PagedSequence, int, torch.Tensor]], wanted: WantedLogits) -> None:
        self._parts, self._wanted = list(parts), wanted
        self.num_tokens = sum(len(ids) for _, _, ids in parts)

    def append(self) -> None:
        """Give the sequences their new positions.

        Raises:
            GenerationError: the cache is full; all sequences are as before.
        """
        StepInput.build([(sequence, len(ids)) for sequence, _, ids in self._parts])

    def undo(self) -> None:
        """Take them back before anything was computed."""
        for sequence, length, _ in self._parts:
            sequence.undo(length)

    def abandon(self) -> None:
        """Take them back; sequences with recurrent states are emptied."""
        for sequence, length, _ in self._parts:
            sequence.truncate(0 if sequence.is_recurrent else length)

    def piece(self, begin: int, end: int) -> Piece:
        """The tokens from one to another, counted over all sequences; at least one."""
        spans: list[Span] = []
        token_ids: list[torch.Tensor] = []
        rows: list[int] = []
        at = count = 0  # tokens of the chunk before a part, and of the piece up to its end
        for sequence, length, ids in self._parts:
            first, last = max(begin - at, 0), min(end - at, len(ids))
            at += len(ids)
            if first >= last:
                continue
            spans.append((sequence, length + first, length + last))
            token_ids.append(ids[first:last])
            count += last - first
            if last == len(ids) and self._wanted == "last":
                rows.append(count - 1)
        return Piece(tuple(spans), torch.cat(token_ids), None if self._wanted == "all" else tuple(rows))
