"""Answers that take long: begun before anything is sent, given up when the client goes away, and always closed.

It does not know what the pieces of an answer are, nor in which form they are sent. There is a piece per token and
stream, so nothing lies between an iterator of pieces and the connection that need not be there.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moesaic.server.errors import ApiError, to_api_error
from moesaic.server.pieces import PIECES, WritePiece

__all__ = ["Answer", "Form", "StreamedResponse", "closing", "error_in_stream", "while_connected"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_NOT_CACHED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@asynccontextmanager
async def closing(pieces: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close an iterator at the end, if it can be closed."""
    try:
        yield pieces
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


async def _end(task: asyncio.Future[T]) -> None:
    """Cancel a task and wait until it has ended; what it gives or raises is forgotten."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of work that is cancelled when the client goes away. The request's body must have been read.

    Raises:
        ApiError: 499, which nobody sees any more; and what the work raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has closed the connection.")
        return task.result()
    finally:
        await _end(gone)
        await _end(task)


class Answer(Generic[T]):
    """The pieces of an answer that has begun, so that what is wrong with a request is said by the HTTP status.

    It is an iterator with `aclose`, which has to be called.
    """

    def __init__(self, pieces: AsyncIterator[T]) -> None:
        self._pieces = pieces
        self._first: asyncio.Future[T] | None = asyncio.ensure_future(anext(pieces))

    @classmethod
    async def begin(cls, request: Request, pieces: AsyncIterator[T], patience: float | None = None) -> Answer[T]:
        """Wait for the first piece, but at most `patience` seconds.

        Raises:
            ApiError: 499; and what the first piece raises.
        """
        answer = cls(pieces)
        assert answer._first is not None
        try:
            await while_connected(request, asyncio.wait({answer._first}, timeout=patience))
            if answer._first.done():
                with suppress(StopAsyncIteration):
                    answer._first.result()
        except BaseException:
            await answer.aclose()
            raise
        return answer

    def __aiter__(self) -> Answer[T]:
        return self

    def __anext__(self) -> Awaitable[T]:
        return anext(self._pieces) if self._first is None else self._take_first(self._first)

    async def _take_first(self, first: asyncio.Future[T]) -> T:
        try:
            return await first
        finally:
            self._first = None

    async def aclose(self) -> None:
        """Cancel what is not there yet."""
        if self._first is not None:
            await _end(self._first)
            self._first = None
        async with closing(self._pieces):
            pass


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How a stream is written.

    Attributes:
        write: makes bytes of a piece.
        failed: makes the last bytes of a stream that ends with an error.
        silence: sent again and again while nothing else is, such as a comment; b"" for nothing.
        every: seconds without a piece after which `silence` is sent.
    """

    write: Callable[[T], bytes]
    failed: Callable[[ApiError], bytes]
    silence: bytes = b""
    every: float = 10.0


class StreamedResponse(StreamingResponse, Generic[T]):
    """Pieces as they come; at the end, and when the client goes away, the answer is closed.

    Args:
        pieces: to send.
        media_type: of the whole.
        form: how they are written.
        headers: further ones.
        answer: that the pieces are made from; it is closed even if no piece was asked for.
    """

    def __init__(
        self,
        pieces: AsyncIterator[T],
        media_type: str,
        form: Form[T],
        headers: Mapping[str, str] | None = None,
        answer: Answer[Any] | None = None,
    ) -> None:
        super().__init__((), media_type=media_type, headers={**_NOT_CACHED, **(headers or {})})
        self._pieces, self._form, self._answer = pieces, form, answer
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        write: WritePiece = scope.get("extensions", {}).get(PIECES) or _through(send)
        sending = asyncio.ensure_future(self._send(send, write))
        others = [asyncio.ensure_future(_disconnected(receive))]
        if self._form.silence:
            others.append(asyncio.ensure_future(self._break_silence(write)))
        try:
            await asyncio.wait({sending, *others}, return_when=asyncio.FIRST_COMPLETED)
            for other in others:
                await _end(other)
            if sending.done():
                sending.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (*others, sending):
                await _end(task)
            async with closing(self._pieces):
                pass
            if self._answer is not None:
                await self._answer.aclose()  # pieces that were never begun have closed nothing

    async def _send(self, send: Send, write: WritePiece) -> None:
        time = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last = time()
        form, pieces, ended = self._form, self._pieces, False
        while not ended:
            try:
                written = form.write(await anext(pieces))
            except StopAsyncIteration:
                return
            except Exception as error:
                written, ended = form.failed(error_in_stream(error)), True
            self._last = time()
            await write(written)

    async def _break_silence(self, write: WritePiece) -> None:
        loop, silence, every = asyncio.get_running_loop(), self._form.silence, self._form.every
        while True:
            await asyncio.sleep(max(self._last + every - loop.time(), 0.0) if self._last else every)
            if self._last and loop.time() - self._last >= every:
                self._last = loop.time()
                await write(silence)


def _through(send: Send) -> WritePiece:
    """Pieces as messages of ASGI, where the web server has no shorter way."""

    async def write(piece: bytes) -> None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})

    return write


def error_in_stream(error: Exception) -> ApiError:
    """What an exception in the middle of a stream is to the client; what is not ours goes to the log, with a number."""
    known = to_api_error(error)
    if known is not None:
        return known
    number = uuid.uuid4().hex[:12]
    _log.error("error %s in the middle of an answer", number, exc_info=error)
    return ApiError(500, f"internal error {number}.", "api_error")
