"""Asks as a load says, and writes down when pieces of answers come.

An open loop asks at given times, however long answers take; a closed loop has users who ask again when they have their
answer. It knows neither HTTP nor engines: who is asked is a `Target`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.engine.serving.interface import EngineClient
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import MoesaicError

__all__ = ["EngineTarget", "Piece", "Record", "Target", "run_closed", "run_open"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer as it came.

    Attributes:
        num_tokens: new ones; 0 for what only brings counts.
        token_ids: of them, where they are known.
        cached_tokens: of the prompt, found in the cache; with the last piece.
        generated_tokens: of the whole answer; with the last piece, where pieces do not say how many tokens they have.
    """

    num_tokens: int
    token_ids: tuple[int, ...] = ()
    cached_tokens: int | None = None
    generated_tokens: int | None = None


class Target(Protocol):
    """Who answers."""

    def ask(self, request: BenchRequest) -> AsyncIterator[Piece]:
        """Send a request; pieces as they come. Raises MoesaicError if it fails."""
        ...


@dataclass(slots=True)
class Record:
    """What became of one request; times are seconds of one clock.

    Attributes:
        user: who asked, in a closed loop.
        prompt_tokens: of its prompt.
        asked: when it was sent, or in an open loop was to be sent.
        times: when pieces with tokens came.
        counts: how many tokens each of them had.
        token_ids: of the answer, where they are known.
        cached_tokens: of the prompt.
        generated_tokens: of the answer.
        ended: when it was over.
        error: why it failed.
    """

    user: int
    prompt_tokens: int
    asked: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    generated_tokens: int = 0
    ended: float = 0.0
    error: str | None = None

    def add(self, piece: Piece, now: float) -> None:
        """Note a piece."""
        if piece.num_tokens:
            self.times.append(now)
            self.counts.append(piece.num_tokens)
            self.token_ids.extend(piece.token_ids)
            self.generated_tokens += piece.num_tokens
        if piece.cached_tokens is not None:
            self.cached_tokens = piece.cached_tokens
        if piece.generated_tokens is not None:
            self.generated_tokens = piece.generated_tokens


class EngineTarget:
    """An engine in this process.

    Args:
        engine: that answers.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling; every request has one of its own that follows from it.
    """

    def __init__(self, engine: EngineClient, temperature: float = 0.0, seed: int = 0) -> None:
        self._engine, self._temperature, self._seed = engine, temperature, seed

    async def ask(self, request: BenchRequest) -> AsyncIterator[Piece]:
        """As `Target`."""
        self._seed += 1
        params = SamplingParams(
            max_tokens=request.num_tokens, temperature=self._temperature, ignore_eos=True, seed=self._seed
        )
        stream = cast(Any, self._engine.generate(request.prompt_ids, params))
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason in ("error", "cancelled"):
                    raise MoesaicError(f"an answer ended with '{chunk.finish_reason}'.")
                cached = None if chunk.stats is None else chunk.stats.cached_tokens
                yield Piece(len(chunk.token_ids), tuple(chunk.token_ids), cached)


async def run_open(target: Target, requests: Sequence[BenchRequest], times: Sequence[float]) -> list[Record]:
    """Send each request at its time (seconds from now), and wait for all answers."""
    start = time.perf_counter()

    async def send(request: BenchRequest, at: float) -> Record:
        delay = start + at - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        return await _ask(target, request, 0, start + at)

    return list(await asyncio.gather(*map(send, requests, times)))


async def run_closed(target: Target, requests: Sequence[BenchRequest], users: int) -> list[Record]:
    """Users who ask one request after the other; user i asks requests i, i + users, and so on."""

    async def ask_all(user: int) -> list[Record]:
        return [await _ask(target, request, user, time.perf_counter()) for request in requests[user::users]]

    return [record for records in await asyncio.gather(*map(ask_all, range(users))) for record in records]


async def _ask(target: Target, request: BenchRequest, user: int, asked: float) -> Record:
    record = Record(user, len(request.prompt_ids), asked)
    try:
        async for piece in target.ask(request):
            record.add(piece, time.perf_counter())
        if not record.times and request.num_tokens:
            record.error = "the answer was empty"
    except MoesaicError as error:
        record.error = str(error)
    record.ended = time.perf_counter()
    return record
