"""An engine for an event loop: it runs in a thread of its own, and what a step brings comes back in one call.

The thread sleeps while nothing is asked for. If it ends by an error, everybody who waits is told, and the status says
so; nothing is restarted here. It knows neither HTTP nor what the engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.interface import EngineStats, EngineStatus
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import EngineDeadError, GenerationError, MoesaicError, OverloadedError, RequestError, TokenizerError

if TYPE_CHECKING:
    from moesaic.engine.serving.grammar_compiler import GrammarCompiler

__all__ = ["AsyncEngine"]

_LOG = logging.getLogger("moesaic.serving")
_STATS_SECONDS = 0.25
"""How old a snapshot may be while steps are computed."""
_RATE_SECONDS = 60.0
"""How far back answers count for how fast they end."""


class _Stream:
    """The pieces of one request that nobody has fetched yet; only for the event loop's thread."""

    def __init__(self, num_answers: int) -> None:
        self.answers_left = num_answers
        self.pieces: deque[Chunk] = deque()
        self.error: MoesaicError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class AsyncEngine:
    """An `EngineClient` on an engine that is loaded in the background.

    Args:
        factory: makes the engine, in the engine's thread.
        max_waiting: most answers that wait for their first step; more are refused.
        warm_grammars: prepare for grammars as soon as the model is loaded, in processes beside this one, and not only
            when the first one comes.
        on_end: called in the event loop if the engine ends by an error, with its text; not by `close`.
    """

    def __init__(
        self,
        factory: Callable[[], Engine],
        max_waiting: int = 256,
        on_end: Callable[[str], None] | None = None,
        warm_grammars: bool = False,
    ) -> None:
        self._factory, self._max_waiting, self._on_end = factory, max_waiting, on_end
        self._warm_grammars = warm_grammars
        self._status: EngineStatus = "loading"
        self._error: str | None = None
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._numbers = count()
        self._streams: dict[str, _Stream] = {}
        self._ready, self._changed = asyncio.Event(), asyncio.Event()
        self._inbox: deque[Callable[[Engine], None]] = deque()  # for the engine's thread
        self._wake, self._closing = threading.Event(), False
        self._submitted = 0
        self._stats = EngineStats()
        self._stats_at = self._computed_at = time.monotonic()
        self._ended: deque[float] = deque(maxlen=64)
        self._compiler: asyncio.Task[GrammarCompiler] | None = None

    def start(self) -> None:
        """Begin to load; call it in the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)
        self._thread.start()

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
        stream = self._streams[key] = _Stream(params.n)
        try:
            self._submitted += params.n
            self._send(lambda engine: self._add(engine, key, prompt_ids, params, matchers))
            while stream.answers_left or stream.pieces:
                while stream.pieces:
                    yield stream.pieces.popleft()
                if stream.error is not None:
                    raise stream.error
                if stream.answers_left:
                    await stream.wait()
        finally:
            self._streams.pop(key, None)
            if stream.answers_left and stream.error is None:
                self._send(lambda engine: engine.cancel(key))
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
        while self._streams:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return not self._streams
        return True

    async def close(self) -> None:
        """As `EngineClient`."""
        self._closing = True
        self._wake.set()
        if self._compiler is not None:
            with contextlib.suppress(TokenizerError):
                (await self._compiler).close()
        if self._thread is not None and self._engine is not None:  # who still loads ends when that is done
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

    def _send(self, command: Callable[[Engine], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._factory()
            self._call(self._loaded, engine)
            with engine.running():
                self._serve(engine)
        except BaseException as error:
            self._call(self._die, "".join(traceback.format_exception(error)))
        finally:
            if engine is not None:
                try:
                    engine.close()
                except Exception:
                    _LOG.exception("the engine could not be closed")

    def _serve(self, engine: Engine) -> None:
        while not self._closing:
            while self._inbox:
                self._inbox.popleft()(engine)
            if engine.has_work:
                self._deliver(engine, engine.step())
            else:
                self._call(self._note_stats, engine.stats())
                self._wake.wait()
                self._wake.clear()

    def _add(
        self, engine: Engine, key: str, prompt_ids: Sequence[int], params: SamplingParams, matchers: Sequence[Any]
    ) -> None:
        error: MoesaicError | None = None
        try:
            engine.add(key, prompt_ids, params, matchers)
        except MoesaicError as problem:
            error = problem
        except Exception:  # one request is not worth the engine
            _LOG.exception("request %s cannot be begun", key)
            error = GenerationError("the request cannot be answered.")
        self._call(self._taken, key, params.n, error)

    def _deliver(self, engine: Engine, pieces: list[tuple[str, Chunk]]) -> None:
        now = time.monotonic()
        if now - self._computed_at > _STATS_SECONDS:
            self._computed_at = now
            self._call(self._note_stats, engine.stats())
        if pieces:
            self._call(self._receive, pieces)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Have the event loop call a function, unless it has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._closing = True

    # What follows runs in the event loop.

    def _loaded(self, engine: Engine) -> None:
        self._engine = engine
        if self._status == "loading":
            self._status = "ready"
            if self._warm_grammars:
                self._start_compiler(engine)
        self._ready.set()

    def _taken(self, key: str, num_answers: int, error: MoesaicError | None) -> None:
        self._submitted -= num_answers
        stream = self._streams.get(key)
        if error is not None and stream is not None:
            stream.error = error
            stream.wake()

    def _note_stats(self, stats: EngineStats) -> None:
        self._stats, self._stats_at = stats, time.monotonic()

    def _receive(self, pieces: list[tuple[str, Chunk]]) -> None:
        """What one step brought."""
        streams = self._streams
        for key, chunk in pieces:
            stream = streams.get(key)
            if chunk.finish_reason is not None:
                self._ended.append(time.monotonic())
                if stream is not None:
                    stream.answers_left -= 1
            if stream is not None:
                stream.pieces.append(chunk)
                stream.wake()

    def _die(self, text: str) -> None:
        if self._status == "dead":
            return
        self._end(text, EngineDeadError("the engine has ended by an error."))
        if self._on_end is not None:
            self._on_end(text)

    def _end(self, text: str, error: EngineDeadError) -> None:
        if self._status == "dead":
            return
        self._status, self._error = "dead", text
        for stream in self._streams.values():
            stream.error = error
            stream.wake()
        self._ready.set()


def _compiler_for(engine: Engine) -> GrammarCompiler:
    from moesaic.engine.serving.grammar_compiler import GrammarCompiler  # what it needs is needed for nothing else

    compiler = GrammarCompiler(engine.grammar_vocabulary())
    compiler.warm()
    return compiler
