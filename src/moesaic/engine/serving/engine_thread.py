"""An engine in a thread of its own: commands in, and what becomes of them back into an event loop.

While nothing is asked for, the thread prepares what later steps need, a piece at a time, and then sleeps. If it ends
by an error, its listener is told; nothing is restarted here. It knows neither requests' streams nor what the engine
computes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.interface import EngineStats
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import GenerationError, MoesaicError

__all__ = ["EngineListener", "EngineThread"]

_LOG = logging.getLogger("moesaic.serving")
_STATS_SECONDS = 0.25
"""How old a snapshot may be while steps are computed."""
_IDLE_SECONDS = 0.1
"""Without work, before something is prepared: who has just been answered may ask again at once."""


class EngineListener(Protocol):
    """Who is told what the thread does; all of it in the event loop."""

    def on_loaded(self, engine: Engine) -> None:
        """It is there."""
        ...

    def on_taken(self, key: str, num_answers: int, error: MoesaicError | None) -> None:
        """A request has begun to wait for its first step, or cannot be answered."""
        ...

    def on_step(self, pieces: list[tuple[str, Chunk]]) -> None:
        """What one step brought, of all requests at once."""
        ...

    def on_stats(self, stats: EngineStats) -> None:
        """A snapshot."""
        ...

    def on_death(self, text: str) -> None:
        """It could not be loaded, or has ended by an error."""
        ...


class EngineThread:
    """Runs an engine.

    Args:
        factory: makes the engine, in the thread.
        listener: see `EngineListener`.
    """

    def __init__(self, factory: Callable[[], Engine], listener: EngineListener) -> None:
        self._factory, self._listener = factory, listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._wake, self._closing = threading.Event(), False
        self._computed_at = time.monotonic()
        self._held: list[tuple[str, Chunk]] = []  # what the last step brought

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to load; the listener is called in this loop."""
        self._loop = loop
        self._thread.start()

    def add(self, key: str, prompt_ids: Sequence[int], params: SamplingParams, matchers: Sequence[Any]) -> None:
        """Have the engine take a request; see `Engine.add`."""
        self._send(lambda engine: self._add(engine, key, prompt_ids, params, matchers))

    def cancel(self, key: str) -> None:
        """Have the engine end a request."""
        self._send(lambda engine: engine.cancel(key))

    def stop(self) -> None:
        """End after the step that is being computed; returns at once."""
        self._closing = True
        self._wake.set()

    def join(self) -> None:
        """Wait for the end, once it is started."""
        self._thread.join()

    def _send(self, command: Callable[[Engine], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    # What follows runs in the thread.

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._factory()
            self._tell(self._listener.on_loaded, engine)
            with engine.running():
                self._serve(engine)
        except BaseException as error:
            self._tell(self._listener.on_death, "".join(traceback.format_exception(error)))
        finally:
            if engine is not None:
                try:
                    engine.close()
                except Exception:
                    _LOG.exception("the engine could not be closed")

    def _serve(self, engine: Engine) -> None:
        engine.runner.on_launch = self._deliver
        try:
            while not self._closing:
                while self._inbox:
                    self._inbox.popleft()(engine)
                if engine.has_work:
                    pieces = engine.step()
                    self._deliver()  # if nothing was under way meanwhile
                    self._held = pieces
                    self._tell_stats(engine)
                else:
                    self._deliver()
                    self._tell(self._listener.on_stats, engine.stats())
                    self._sleep(engine)
        finally:
            self._deliver()
            engine.runner.on_launch = lambda: None

    def _sleep(self, engine: Engine) -> None:
        """Until something is asked for."""
        if not self._wake.wait(_IDLE_SECONDS):
            while engine.prepare() and not self._wake.is_set():
                pass
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
        self._tell(self._listener.on_taken, key, params.n, error)

    def _tell_stats(self, engine: Engine) -> None:
        """From time to time."""
        now = time.monotonic()
        if now - self._computed_at > _STATS_SECONDS:
            self._computed_at = now
            self._tell(self._listener.on_stats, engine.stats())

    def _deliver(self) -> None:
        """Hand over what the last step brought; called when the next one is under way, or there is none.

        Whoever gets it wants Python's lock, which this thread needs until then: it would wait for it with a device that
        has nothing to do.
        """
        pieces, self._held = self._held, []
        if pieces:
            self._tell(self._listener.on_step, pieces)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Have the event loop call a function, unless it has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._closing = True
