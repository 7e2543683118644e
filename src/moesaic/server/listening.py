"""The socket, and uvicorn as this server uses it: no signals, no logs of its own, no patience with silent clients.

It does not know what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesaic.errors import ConfigError
from moesaic.server.options import ServerOptions
from moesaic.server.pieces import WithPieces

__all__ = ["WebServer", "bind", "make_web_server", "url_of"]

_HEADER_SECONDS = 15.0
_KEEP_ALIVE_SECONDS = 30
_LAST_SECONDS = 2


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address does not exist here, or somebody listens there already.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on '{host}': {error.strerror}. Give an address of this computer.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another with --port, or --host."
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this computer finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WebServer(uvicorn.Server):
    """uvicorn that leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: `lifecycle` handles them."""
        yield

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self.server_state.tasks)

    def break_off(self) -> None:
        """Cancel them."""
        self.force_exit = True
        for task in list(self.server_state.tasks):
            task.cancel()


def make_web_server(app: ASGIApp, options: ServerOptions) -> WebServer:
    """Uvicorn for an application, with the limits that only it can keep to."""
    config = uvicorn.Config(
        WithPieces(app),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=options.limits.connections,
        h11_max_incomplete_event_size=options.limits.header_bytes,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return WebServer(config)


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which a request's head does not come to an end."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_patience()

    @property
    def _is_idle(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or bool(cycle.response_complete)

    def _watch(self) -> None:
        if not self._is_idle:
            self._end_patience()
        elif self._patience is None:
            self._patience = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._patience = None
        if self._is_idle and not self.transport.is_closing():
            self.transport.close()

    def _end_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
