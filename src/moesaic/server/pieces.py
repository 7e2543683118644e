"""A short way for the pieces of a stream: from an answer to its connection, past everything that only heads pass.

A message of ASGI goes through a function of each middleware and through the web server's state machine. That is right
for the head and the end of an answer; for a piece per token and stream it takes longer than making the piece. So the
web server offers this extension of ASGI with a request, and `streams` uses it where it is there. It does not know what
is sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

__all__ = ["PIECES", "WithPieces", "WritePiece"]

PIECES = "moesaic.pieces"
"""Key of the extension: a `WritePiece`, to be used between an answer's head and its end, both sent as ever."""
WritePiece = Callable[[bytes], Awaitable[None]]
"""Writes bytes; waits while the client takes nothing, and does nothing when it has gone."""


class WithPieces:
    """An application whose requests have the extension if uvicorn runs it, and their answers come in chunks.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and scope["http_version"] == "1.1" and scope["method"] != "HEAD":
            scope.setdefault("extensions", {})[PIECES] = _writer(cycle)
        await self._app(scope, receive, send)


def _writer(cycle: Any) -> WritePiece:
    """Chunks (RFC 9112, section 7.1) as h11 makes them of an answer without a length."""
    flow, write = cycle.flow, cycle.transport.write

    async def write_piece(piece: bytes) -> None:
        if flow.write_paused and not cycle.disconnected:
            await flow.drain()
        if piece and not cycle.disconnected:
            write(b"%x\r\n%b\r\n" % (len(piece), piece))

    return write_piece
