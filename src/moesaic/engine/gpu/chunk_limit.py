"""How many tokens of prompts go through the layers at once where the VRAM has shown not to suffice for more.

Nobody can say beforehand whether a chunk's activations find room: other programs take memory, and what PyTorch's
allocator holds may be in pieces. So a chunk that failed halves what is tried; pieces that went through let something
larger be tried again, ever more rarely while that fails. It knows numbers of tokens, and neither memory nor models.
"""

from __future__ import annotations

import logging

__all__ = ["ChunkLimit"]

_LOG = logging.getLogger("moesaic.gpu")

_PATIENCE, _MOST_PATIENCE = 8, 64
"""Pieces that go through before a larger one is tried: at first, and after many trials that failed."""


class ChunkLimit:
    """What was learnt of a runner's chunks.

    Args:
        most: tokens that a chunk can have.
        least: tokens of a chunk that is not cut, however little memory there is.

    Attributes:
        size: most tokens of a piece; None: nothing has failed, or all is well again.
        failures: pieces that found too little memory, so far.
    """

    def __init__(self, most: int, least: int) -> None:
        self._most, self._least = most, least
        self.size: int | None = None
        self.failures = 0
        self._passed, self._patience = 0, _PATIENCE

    def pieces(self, num_tokens: int) -> list[int]:
        """How many tokens the pieces of a chunk should have: as few pieces as may be, about as long as each other."""
        size = num_tokens if self.size is None else self.size * (2 if self._passed >= self._patience else 1)
        count = -(-num_tokens // size)
        longest = -(-num_tokens // count)
        return [min(longest, num_tokens - first) for first in range(0, num_tokens, longest)]

    def can_cut(self, num_tokens: int) -> bool:
        """Whether a piece of so many tokens could go in smaller ones."""
        return num_tokens > self._least

    def failed(self, num_tokens: int, reason: str) -> None:
        """The memory did not suffice for a piece of so many tokens, which can be cut.

        Args:
            num_tokens: of the piece.
            reason: for people, a sentence.
        """
        self.failures, self._passed = self.failures + 1, 0
        if self.size is not None and num_tokens > self.size:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            return
        is_new, self.size = self.size is None, max(self._least, -(-num_tokens // 2))
        if is_new:
            _LOG.warning(
                "prompts go through the layers in pieces of %d tokens from now on, which takes longer, and longer "
                "pieces are tried again from time to time: %s",
                self.size,
                reason,
            )
        else:
            _LOG.info("prompts go through the layers in pieces of %d tokens", self.size)

    def passed(self, num_tokens: int) -> None:
        """A piece of so many tokens went through."""
        if self.size is None:
            return
        if num_tokens <= self.size:
            self._passed += 2 * num_tokens > self.size  # short ones say little
            return
        self._passed, self._patience = 0, _PATIENCE
        self.size = num_tokens if num_tokens < self._most else None
        if self.size is None:
            _LOG.info("prompts go through the layers in chunks of %d tokens again", self._most)
