"""A server from its first byte to its last: it listens at once, loads, answers, drains, and knows when its engine dies.

Who loads what is given to it. A first signal lets running requests end, a second one does not, a third one ends the
process where it stands.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from starlette.applications import Starlette

from moesaic.errors import MoesaicError
from moesaic.server.app import build_app
from moesaic.server.listening import WebServer, bind, make_web_server, url_of
from moesaic.server.metrics import Metrics
from moesaic.server.options import ServerOptions
from moesaic.server.state import ServerState

__all__ = ["Lifecycle", "Load", "serve"]

_LOG = logging.getLogger("moesaic.server")
_LOOK_SECONDS = 0.2
_LAST_WORDS_SECONDS = 2.0
_CLOSE_SECONDS = 10.0
MAX_RESTARTS = 3
RESTART_WINDOW_SECONDS = 600.0

Load = Callable[[Metrics], Awaitable[ServerState]]
"""Loads a model: what it gives has an engine that is ready, and that the metrics observe."""


class Lifecycle:
    """One run of a server.

    Args:
        load: a model; called anew for each restart.
        options: of the server.
        listener: that `bind` gave; closed at the end.
        on_ready: called when requests are taken, first and after restarts.
    """

    def __init__(
        self,
        load: Load,
        options: ServerOptions,
        listener: socket.socket,
        on_ready: Callable[[ServerState], None] = lambda state: None,
    ) -> None:
        self._load, self._options, self._listener, self._on_ready = load, options, listener, on_ready
        self.metrics = Metrics()
        self.app: Starlette = build_app(None, options, metrics=self.metrics)
        self._web: WebServer = make_web_server(self.app, options)
        self._stop, self._force = asyncio.Event(), asyncio.Event()
        self._failures: deque[float] = deque()
        self._left_behind = False

    @property
    def left_behind(self) -> bool:
        """Whether threads may still be at work: it was told not to wait, or they did not end in time."""
        return self._force.is_set() or self._left_behind

    def stop(self) -> None:
        """End: the first call drains, the second does not wait any longer."""
        (self._force if self._stop.is_set() else self._stop).set()

    async def run(self) -> int:
        """Serve until stopped; the exit code.

        Raises:
            MoesaicError: the model could not be loaded the first time.
        """
        serving = asyncio.create_task(self._web.serve(sockets=[self._listener]))
        working = asyncio.create_task(self._work())
        forced = asyncio.create_task(self._force.wait())
        try:
            await asyncio.wait({serving, working, forced}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            _LOG.error("the server ends %s", "at once" if self._force.is_set() else "because it cannot listen any more")
            return 1
        finally:
            if not working.done():
                self._web.break_off()
            self._web.should_exit = True
            for task in (working, forced):
                task.cancel()
            await asyncio.wait({serving, working, forced}, timeout=2 * _LAST_WORDS_SECONDS)
            self._listener.close()

    async def _work(self) -> int:
        """Load, wait for what happens, act; the exit code."""
        while True:
            state = await self._loaded()
            if self._stop.is_set():
                return await self._drain(state)
            if state is not None:
                self.app.state.moesaic = state
                self._on_ready(state)
                if not await self._has_died(state):
                    return await self._drain(state)
                _LOG.error("the engine has ended: %s", state.engine.error)
                await self._say_last_words()
                await self._close(state)
            if not self._may_restart():
                return 1
            self.app.state.moesaic = state = None  # there may be memory for one model only

    async def _loaded(self) -> ServerState | None:
        """The model; None if it could not be loaded, though it could before, or the server is to stop."""
        loading = asyncio.ensure_future(self._load(self.metrics))
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
            self._left_behind = not loading.done()
            return loading.result() if loading.done() else None
        except Exception as error:
            if not self._failures:
                raise
            _LOG.error("the model could not be loaded again: %s", error, exc_info=not isinstance(error, MoesaicError))
            return None
        finally:
            for task in (loading, stopped):
                task.cancel()
            await asyncio.wait({stopped})

    async def _has_died(self, state: ServerState) -> bool:
        """Wait for the engine's end or for that of the server; whether it was the engine's."""
        while not self._stop.is_set():
            if state.engine.status == "dead":
                return True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _LOOK_SECONDS)
        return False

    def _may_restart(self) -> bool:
        """Whether a dead engine is loaded anew."""
        if self._options.on_engine_failure != "restart":
            return False
        now = time.monotonic()
        while self._failures and now - self._failures[0] > RESTART_WINDOW_SECONDS:
            self._failures.popleft()
        if len(self._failures) >= MAX_RESTARTS:
            _LOG.error("the engine ended %d times in %g seconds: giving up", MAX_RESTARTS + 1, RESTART_WINDOW_SECONDS)
            return False
        self._failures.append(now)
        _LOG.info("loading the model again (%d of %d times)", len(self._failures), MAX_RESTARTS)
        return True

    async def _drain(self, state: ServerState | None) -> int:
        """Let running requests end, within their time."""
        self.app.state.stopping = True
        if state is None:
            return 0
        seconds = self._options.drain_seconds
        _LOG.info("ending: %d requests get up to %g seconds", self._web.num_running, seconds)
        deadline = time.monotonic() + seconds
        await state.engine.drain(seconds)
        if not await self._are_all_answered(deadline - time.monotonic()):
            _LOG.warning("%d requests are broken off", self._web.num_running)
        await self._close(state)  # streams that are left end with an error
        await self._say_last_words()
        return 0

    async def _close(self, state: ServerState) -> None:
        try:
            await asyncio.wait_for(state.engine.close(), _CLOSE_SECONDS)
        except TimeoutError:
            self._left_behind = True
            _LOG.error("the engine did not end within %g seconds", _CLOSE_SECONDS)
        except Exception:
            _LOG.exception("the engine could not be closed")

    async def _say_last_words(self) -> None:
        """Give streams a moment to tell their clients that the engine is dead."""
        await self._are_all_answered(_LAST_WORDS_SECONDS)

    async def _are_all_answered(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._web.num_running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._web.num_running


def serve(load: Load, options: ServerOptions, on_listening: Callable[[str], None], on_ready: Callable[[], None]) -> int:
    """Serve a model until a signal comes; the exit code.

    Args:
        load: the model.
        options: of the server.
        on_listening: called with the address.
        on_ready: called when requests are taken.

    Raises:
        ConfigError: it cannot listen there.
        MoesaicError: the model could not be loaded.
    """
    listener = bind(options.host, options.port)

    async def run() -> int:
        lifecycle = Lifecycle(load, options, listener, lambda state: on_ready())
        with _signals(lifecycle.stop):
            on_listening(url_of(listener))
            code = await lifecycle.run()
        if lifecycle.left_behind:  # Python would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    return asyncio.run(run())


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function in the event loop for SIGTERM and SIGINT; end the process when a third one comes."""
    loop = asyncio.get_running_loop()
    seen = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 2:  # not even the event loop answers
            os._exit(1)
        loop.call_soon_threadsafe(stop)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
