"""An engine for an event loop: it runs in a thread of its own, and what a step brings comes back in one call.

If the engine ends by an error, everybody who waits is told, and the status says so; nothing is restarted here. It knows
neither HTTP nor what the engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.engine_thread import EngineThread
from moesaic.engine.serving.interface import EngineStats, EngineStatus
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.pending import Pending, TokenTimes
from moesaic.errors import EngineDeadError, MoesaicError, OverloadedError, RequestError, TokenizerError

if TYPE_CHECKING:
    from moesaic.engine.serving.grammar_compiler import GrammarCompiler

__all__ = ["AsyncEngine"]

_RATE_SECONDS = 60.0
"""How far back answers count for how fast they end."""


class AsyncEngine:
    """An `EngineClient` on an engine that is loaded in the background.

    Args:
        factory: makes the engine, in the engine's thread.
        max_waiting: most answers that wait for their first step; more are refused.
        warm_grammars: prepare for grammars as soon as the model is loaded, in processes beside this one, and not only
            when the first one comes.
        on_end: called in the event loop if the engine ends by an error, with its text; not by `close`.
        times: told when tokens come, in the event loop.
    """

    def __init__(
        self,
        factory: Callable[[], Engine],
        max_waiting: int = 256,
        on_end: Callable[[str], None] | None = None,
        warm_grammars: bool = False,
        times: TokenTimes | None = None,
    ) -> None:
        self._max_waiting, self._on_end = max_waiting, on_end
        self._warm_grammars, self._times = warm_grammars, times
        self._status: EngineStatus = "loading"
        self._error: str | None = None
        self._engine: Engine | None = None
        self._thread = EngineThread(factory, self)
        self._numbers = count()
        self._pending: dict[str, Pending] = {}
        self._ready, self._changed = asyncio.Event(), asyncio.Event()
        self._submitted = 0
        self._stats, self._stats_at = EngineStats(), time.monotonic()
        self._ended: deque[float] = deque(maxlen=64)
        self._compiler: asyncio.Task[GrammarCompiler] | None = None

    def start(self) -> None:
        """Begin to load; call it in the event loop that will ask."""
        self._thread.start(asyncio.get_running_loop())

    async def wait_ready(self) -> Engine:
        """The engine, when it is loaded.

        Raises:
            EngineDeadError: it could not be loaded.
        """
        await self._ready.wait()
        if self._engine is None:
            raise EngineDeadError(f"the engine did not start: {self._error}")
        return self._engine

    @property
    def status(self) -> EngineStatus:
        """As `EngineClient`."""
        return self._status

    @property
    def error(self) -> str | None:
        """As `EngineClient`."""
        return self._error

    @property
    def context_length(self) -> int:
        """As `EngineClient`; 0 while it loads."""
        return 0 if self._engine is None else self._engine.context_length

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[Chunk]:
        """As `EngineClient.generate`."""
        asked = time.perf_counter()
        engine = self._accepting()
        engine.check(prompt_ids, params)
        self._check_load(engine, params.n)
        matchers: list[Any] = []
        if params.grammar is not None:
            compiled = await (await self._grammar_compiler(engine)).compile(params.grammar)
            matchers = [compiled.matcher() for _ in range(params.n)]
            self._accepting()  # much may have happened
            self._check_load(engine, params.n)
        key = f"{request_id or 'request'}-{next(self._numbers)}"  # callers' names need not be unique
        pending = self._pending[key] = Pending(params.n, asked)
        pieces = pending.pieces
        try:
            self._submitted += params.n
            self._thread.add(key, prompt_ids, params, matchers)
            while pieces or pending.answers_left:
                while pieces:
                    yield pieces.popleft()
                if pending.error is not None:
                    raise pending.error
                if pending.answers_left:
                    await pending.changed()
        finally:
            self._pending.pop(key, None)
            if pending.answers_left and pending.error is None:
                self._thread.cancel(key)
            self._changed.set()

    def stats(self) -> EngineStats:
        """As `EngineClient`."""
        stats = self._stats
        if not stats.running:
            return stats
        return replace(stats, last_step=stats.last_step + time.monotonic() - self._stats_at)

    async def drain(self, timeout: float) -> bool:
        """As `EngineClient`."""
        if self._status in ("ready", "loading"):
            self._status = "draining"
        deadline = time.monotonic() + timeout
        while self._pending:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return not self._pending
        return True

    async def close(self) -> None:
        """As `EngineClient`."""
        self._thread.stop()
        if self._compiler is not None:
            with contextlib.suppress(TokenizerError):
                (await self._compiler).close()
        if self._engine is not None:  # who still loads ends when that is done
            await asyncio.to_thread(self._thread.join)
        self._end("it was closed", EngineDeadError("the engine was closed."))

    async def _grammar_compiler(self, engine: Engine) -> GrammarCompiler:
        """Made when it is first needed."""
        try:
            return await asyncio.shield(self._start_compiler(engine))
        except TokenizerError as error:
            raise RequestError(str(error), "grammar") from error

    def _start_compiler(self, engine: Engine) -> asyncio.Task[GrammarCompiler]:
        if self._compiler is None:
            self._compiler = asyncio.create_task(asyncio.to_thread(_compiler_for, engine))
        return self._compiler

    def _accepting(self) -> Engine:
        if self._status == "loading":
            raise OverloadedError("the model is still being loaded: try again in a moment.", 5.0)
        if self._status != "ready" or self._engine is None:
            raise EngineDeadError(f"the engine takes no more requests: it is {self._status}.")
        return self._engine

    def _check_load(self, engine: Engine, num_answers: int) -> None:
        waiting = engine.num_waiting + self._submitted
        if waiting + num_answers > self._max_waiting:
            raise OverloadedError(
                f"{waiting} answers wait already, and at most {self._max_waiting} may: try again later.",
                self._retry_after(waiting),
            )

    def _retry_after(self, waiting: int) -> float:
        """Seconds until those who wait have begun, as answers end at present."""
        now = time.monotonic()
        recent = [ended for ended in self._ended if now - ended < _RATE_SECONDS]
        if not recent:
            return _RATE_SECONDS / 4
        return min(600.0, max(1.0, waiting * (now - recent[0]) / len(recent)))

    # What follows is called by the engine's thread, in the event loop.

    def on_loaded(self, engine: Engine) -> None:
        """As `EngineListener`."""
        self._engine = engine
        if self._status == "loading":
            self._status = "ready"
            if self._warm_grammars:
                self._start_compiler(engine)
        self._ready.set()

    def on_taken(self, key: str, num_answers: int, error: MoesaicError | None) -> None:
        """As `EngineListener`."""
        self._submitted -= num_answers
        pending = self._pending.get(key)
        if error is not None and pending is not None:
            pending.fail(error)

    def on_stats(self, stats: EngineStats) -> None:
        """As `EngineListener`."""
        self._stats, self._stats_at = stats, time.monotonic()

    def on_step(self, pieces: list[tuple[str, Chunk]]) -> None:
        """As `EngineListener`."""
        pending, times, now = self._pending, self._times, time.perf_counter()
        for key, chunk in pieces:
            if chunk.finish_reason is not None:
                self._ended.append(time.monotonic())
            request = pending.get(key)
            if request is not None:
                request.add(chunk, now, times)

    def on_death(self, text: str) -> None:
        """As `EngineListener`."""
        if self._status == "dead":
            return
        self._end(text, EngineDeadError("the engine has ended by an error."))
        if self._on_end is not None:
            self._on_end(text)

    def _end(self, text: str, error: EngineDeadError) -> None:
        if self._status == "dead":
            return
        self._status, self._error = "dead", text
        for pending in self._pending.values():
            pending.fail(error)
        self._ready.set()


def _compiler_for(engine: Engine) -> GrammarCompiler:
    from moesaic.engine.serving.grammar_compiler import GrammarCompiler  # what it needs is needed for nothing else

    compiler = GrammarCompiler(engine.grammar_vocabulary())
    compiler.warm()
    return compiler
