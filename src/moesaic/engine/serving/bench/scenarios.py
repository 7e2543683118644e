"""Two questions to an engine: what a long prompt costs the others, and what a known beginning saves.

It knows no HTTP and prints nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moesaic.engine.serving.bench.drive import Record, Target, run_closed
from moesaic.engine.serving.bench.figures import percentile
from moesaic.engine.serving.bench.load import BenchRequest, Lengths, make_requests
from moesaic.errors import MoesaicError

__all__ = ["Fairness", "Prefix", "measure_fairness", "measure_prefix"]

_SECONDS_ALONE = 5.0


@dataclass(frozen=True, slots=True)
class Fairness:
    """Times between tokens of those who decode, without and with a long prompt; milliseconds.

    Attributes:
        users: who decode.
        prompt_tokens: of the long prompt.
        prompt_seconds: until its first token.
        before_p50, before_p99, before_max: while they are alone.
        during_p50, during_p99, during_max: until the first token of the long prompt.
        gaps: how many times were measured before and during.
    """

    users: int
    prompt_tokens: int
    prompt_seconds: float
    before_p50: float
    before_p99: float
    before_max: float
    during_p50: float
    during_p99: float
    during_max: float
    gaps: tuple[int, int]

    @property
    def ratio_p99(self) -> float:
        """99th percentile with the long prompt over the median without."""
        return self.during_p99 / self.before_p50

    @property
    def ratio_max(self) -> float:
        """Longest time with the long prompt over the median without."""
        return self.during_max / self.before_p50


@dataclass(frozen=True, slots=True)
class Prefix:
    """Milliseconds to the first token of prompts of one length, the second of which begins as the first.

    Attributes:
        prompt_tokens: of each prompt.
        shared_tokens: with which both begin.
        cached_tokens: of the second one, found in the cache.
        first, second: medians over all pairs.
        pairs: how many were measured.
    """

    prompt_tokens: int
    shared_tokens: int
    cached_tokens: int
    first: float
    second: float
    pairs: int

    @property
    def ratio(self) -> float:
        """Second over first."""
        return self.second / self.first


async def measure_fairness(
    target: Target,
    vocab_size: int,
    *,
    users: int = 4,
    prompt: int = 128,
    answer: int = 4096,
    long_prompt: int = 32768,
    seconds_alone: float = _SECONDS_ALONE,
    seed: int = 0,
) -> Fairness:
    """Let users decode, then send a long prompt.

    Args:
        target: who answers.
        vocab_size: tokens are below this.
        users: who decode; each asks again when its answer is over, until the long prompt is answered.
        prompt: tokens of their prompts.
        answer: tokens of their answers.
        long_prompt: tokens of the long prompt.
        seconds_alone: that are measured without it.
        seed: of all choices.

    Raises:
        MoesaicError: a request failed, or there were too few tokens to say anything.
    """
    asked = make_requests(users, Lengths(prompt, prompt), Lengths(answer, answer), vocab_size, seed=seed)
    (long,) = make_requests(1, Lengths(long_prompt, long_prompt), Lengths(1, 1), vocab_size, seed=seed + 1)
    times: list[list[float]] = [[] for _ in asked]
    decoding = [
        asyncio.create_task(_decode_on(target, request, own)) for request, own in zip(asked, times, strict=True)
    ]
    try:
        while not all(len(own) > 1 for own in times):
            _raise_failure(decoding)
            await asyncio.sleep(0.01)
        begin = time.perf_counter()
        await asyncio.sleep(seconds_alone)
        middle = time.perf_counter()
        (record,) = await run_closed(target, [long], 1)
        _check(record)
        _raise_failure(decoding)
    finally:
        for task in decoding:
            task.cancel()
        await asyncio.gather(*decoding, return_exceptions=True)
    before = _between(times, begin, middle)
    during = _between(times, middle, record.times[0])
    if not before or not during:
        raise MoesaicError("too few tokens came to compare: use a longer prompt, or more seconds.")
    return Fairness(
        users,
        long_prompt,
        record.times[0] - record.asked,
        *_of(before),
        *_of(during),
        (len(before), len(during)),
    )


async def measure_prefix(
    target: Target, vocab_size: int, *, shared: int = 4096, own: int = 64, pairs: int = 3, seed: int = 0
) -> Prefix:
    """Pairs of prompts of which the second begins as the first; every pair begins differently.

    Args:
        target: who answers.
        vocab_size: tokens are below this.
        shared: tokens with which both begin.
        own: tokens that follow.
        pairs: to take medians of.
        seed: of all tokens.

    Raises:
        MoesaicError: a request failed.
    """
    length = Lengths(shared + own, shared + own)
    first: list[float] = []
    second: list[float] = []
    cached: list[int] = []
    for pair in range(pairs):
        asked = make_requests(2, length, Lengths(1, 1), vocab_size, seed=seed + pair, shared_prefix=shared)
        records = await run_closed(target, asked, 1)
        for record, into in zip(records, (first, second), strict=True):
            _check(record)
            into.append(1e3 * (record.times[0] - record.asked))
        cached.append(records[1].cached_tokens)
    return Prefix(shared + own, shared, min(cached), percentile(first, 50) or 0.0, percentile(second, 50) or 0.0, pairs)


async def _decode_on(target: Target, request: BenchRequest, times: list[float]) -> None:
    """Ask again and again, and note when tokens come."""
    while True:
        async for piece in target.ask(request):
            if piece.num_tokens:
                times.append(time.perf_counter())
        times.append(float("nan"))  # what follows is no token of the same answer


def _between(times: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Milliseconds between tokens of which the later came in that time."""
    return [1e3 * (b - a) for own in times for a, b in pairwise(own) if begin < b <= end and a == a]


def _of(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 50) or 0.0, percentile(values, 99) or 0.0, max(values)


def _check(record: Record) -> None:
    if record.error is not None:
        raise MoesaicError(f"a prompt of {record.prompt_tokens} tokens failed: {record.error}")


def _raise_failure(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
