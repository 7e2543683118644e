"""What requests have not fetched yet: a queue of pieces for each, filled for all of them once per step.

It belongs to the event loop's thread and knows neither engines nor threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from moesaic.engine.serving.outputs import Chunk
from moesaic.errors import MoesaicError

__all__ = ["Pending", "TokenTimes"]


class TokenTimes(Protocol):
    """Who wants to know when tokens come."""

    def first_token(self, seconds: float) -> None:
        """An answer's first token has come, so long after it was asked for."""
        ...

    def next_token(self, seconds: float) -> None:
        """A further piece of an answer has come, so long after the one before."""
        ...


class Pending:
    """The pieces of one request that nobody has fetched yet.

    Args:
        num_answers: that the request has.
        asked: when it was asked for, by `time.perf_counter`.

    Attributes:
        answers_left: answers that have not ended.
        pieces: oldest first.
        error: with which it ends, after the pieces.
    """

    __slots__ = ("_asked", "_came", "_waiter", "answers_left", "error", "pieces")

    def __init__(self, num_answers: int, asked: float) -> None:
        self.answers_left = num_answers
        self.pieces: deque[Chunk] = deque()
        self.error: MoesaicError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._asked = asked
        self._came: list[float | None] = [None] * num_answers

    def add(self, chunk: Chunk, now: float, times: TokenTimes | None) -> None:
        """The next piece, come at a time of `time.perf_counter`."""
        if chunk.finish_reason is not None:
            self.answers_left -= 1
        if times is not None and chunk.token_ids:
            before, self._came[chunk.index] = self._came[chunk.index], now
            if before is None:
                times.first_token(now - self._asked)
            else:
                times.next_token(now - before)
        self.pieces.append(chunk)
        self._wake()

    def fail(self, error: MoesaicError) -> None:
        """There will be no more pieces."""
        self.error = error
        self._wake()

    def changed(self) -> asyncio.Future[None]:
        """Done with the next piece or error; for one who waits."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
