"""Decode steps of a runner on a GPU, one at a time, each timed: what happens between two of them is the caller's."""

from __future__ import annotations

import time

import torch

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.kvcache.paged import PagedSequence

__all__ = ["DecodeWays", "TimedDecode"]

PROMPT = 4
_SEED = 0


class TimedDecode:
    """Sequences that are decoded together, with new random prompts when they have become long.

    Args:
        runner: of a loaded model.
        batch: sequences.
        longest: tokens, the prompt's included, after which others begin; between turns only.
    """

    def __init__(self, runner: ModelRunner, batch: int = 1, longest: int = 512) -> None:
        self.runner, self._batch, self._longest = runner, batch, longest
        self._random = torch.Generator().manual_seed(_SEED)
        self._sequences: list[PagedSequence] = []
        self._tokens: list[int] = []

    def renew(self) -> bool:
        """Begin anew if the sequences are long, or there are none; whether that was done."""
        if self._sequences and self._sequences[0].length < self._longest:
            return False
        self.close()
        for _ in range(self._batch):
            prompt = torch.randint(self.runner.decoder.vocab_size, (PROMPT,), generator=self._random)
            self._sequences.append(self.runner.new_sequence())
            self._tokens.append(int(self.runner.prefill([(self._sequences[-1], prompt)]).argmax(-1)))
        return True

    def step(self) -> float:
        """Append the likeliest token to each sequence; seconds until the next ones were known."""
        if not self._sequences:
            self.renew()
        began = time.perf_counter()
        self._tokens = self.runner.decode_likeliest(self._sequences, self._tokens)
        return time.perf_counter() - began

    def close(self) -> None:
        """Give all blocks back."""
        for sequence in self._sequences:
            sequence.free()
        self._sequences, self._tokens = [], []


class DecodeWays:
    """Steps of which nothing goes on when they are over; `switch` is left to do for `Ways` (`paired_turns`).

    Args:
        decode: makes the steps.
    """

    def __init__(self, decode: TimedDecode) -> None:
        self.decode = decode

    def begin(self) -> None:
        """As `Ways`."""
        if self.decode.renew():
            self.decode.step()

    def step(self) -> float:
        """As `Ways`."""
        return self.decode.step()

    def is_settled(self) -> bool:
        """As `Ways`."""
        return True

    def settle(self) -> float:
        """As `Ways`."""
        return 0.0
