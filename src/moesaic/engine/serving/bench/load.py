"""What a benchmark asks and when: prompts of random tokens, lengths from a range, arrivals at a rate.

All of it follows from a seed. It asks nothing itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import ConfigError

__all__ = ["Arrivals", "BenchRequest", "Lengths", "arrival_times", "make_requests"]

Arrivals = Literal["poisson", "fixed"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of numbers of tokens, both ends included; all are equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "128" or "64-256".

        Raises:
            ConfigError: it is neither.
        """
        parts = text.split("-")
        low, high = (int(part) if part.isdecimal() else 0 for part in (parts[0], parts[-1]))
        if len(parts) > 2 or not 1 <= low <= high:
            raise ConfigError(f"'{text}' is no length: expected a number of tokens such as 128, or a range as 64-256.")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt of token ids, and how many tokens answer it."""

    prompt_ids: tuple[int, ...]
    num_tokens: int


def make_requests(
    count: int, prompt: Lengths, answer: Lengths, vocab_size: int, *, seed: int = 0, shared_prefix: int = 0
) -> list[BenchRequest]:
    """Requests that follow from the seed; more of them begin with the same ones.

    Args:
        count: how many.
        prompt: tokens of their prompts.
        answer: tokens of their answers.
        vocab_size: tokens are below this.
        seed: of all choices.
        shared_prefix: tokens at the beginning that all prompts have in common; the last token is always a prompt's own.
    """
    rng = random.Random(seed)
    prefix = tuple(rng.randrange(vocab_size) for _ in range(shared_prefix))
    made = []
    for _ in range(count):
        length, tokens = prompt.draw(rng), answer.draw(rng)
        common = prefix[: length - 1]
        own = tuple(rng.randrange(vocab_size) for _ in range(length - len(common)))
        made.append(BenchRequest(common + own, tokens))
    return made


def arrival_times(count: int, rate: float, kind: Arrivals, *, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests are sent, the first one at 0.

    Args:
        count: how many.
        rate: requests per second on average.
        kind: "poisson" (gaps are exponential: people who do not know of each other) or "fixed" (all gaps are equal).
        seed: of the gaps.
    """
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate) if kind == "poisson" else 1.0 / rate
    return times
