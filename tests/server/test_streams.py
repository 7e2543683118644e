"""Answers begin, end and are given up properly, whatever the client and the engine do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from starlette.requests import Request

from moesaic.errors import EngineDeadError, OverloadedError
from moesaic.server.errors import ApiError
from moesaic.server.streams import Answer, Form, StreamedResponse, closing, error_in_stream, while_connected

Message = MutableMapping[str, Any]


class Pieces:
    """Pieces with a wait before each; remembers whether it was closed."""

    def __init__(self, pieces: list[bytes], wait: float = 0.0, error: Exception | None = None) -> None:
        self._pieces, self._wait, self._error = list(pieces), wait, error
        self.closed = 0
        self.cancelled = 0

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        try:
            await asyncio.sleep(self._wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error is not None:
            raise self._error
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop(0)

    async def aclose(self) -> None:
        self.closed += 1


class Connection:
    """A client that leaves when it is told to, and keeps what is sent."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.sent: list[Message] = []
        self.stuck = False

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self.receive)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def run(test: Callable[[Connection], Awaitable[None]]) -> None:
    """Run a test with a connection, within seconds."""

    async def whole() -> None:
        await asyncio.wait_for(test(Connection()), 10)
        assert len(asyncio.all_tasks()) == 1, "tasks are left over"

    asyncio.run(whole())


def as_bytes(answer: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    async def pieces() -> AsyncGenerator[bytes, None]:
        async with closing(answer):
            async for piece in answer:
                yield piece

    return pieces()


def form(silence: bytes = b"", every: float = 10.0) -> Form[bytes]:
    return Form(lambda piece: piece, lambda error: error.message.encode(), silence, every)


def test_an_answer_gives_all_pieces_in_order() -> None:
    async def test(connection: Connection) -> None:
        for patience in (None, 5.0, 0.001):  # with the last, the first piece comes after the answer has begun
            pieces = Pieces([b"a", b"b"], wait=0.02)
            answer = await Answer.begin(connection.request, pieces, patience)
            assert [piece async for piece in answer] == [b"a", b"b"]
            await answer.aclose()
            assert (pieces.closed, pieces.cancelled) == (1, 0)

    run(test)


def test_an_answer_of_nothing() -> None:
    async def test(connection: Connection) -> None:
        answer = await Answer.begin(connection.request, Pieces([]))
        assert [piece async for piece in answer] == []
        await answer.aclose()

    run(test)


def test_what_the_first_piece_raises_is_raised_at_the_beginning() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([], error=OverloadedError("full", 1.0))
        with pytest.raises(OverloadedError):
            await Answer.begin(connection.request, pieces)
        assert pieces.closed == 1

    run(test)


def test_what_comes_after_the_patience_is_raised_in_the_answer() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([], wait=0.05, error=EngineDeadError("died"))
        answer = await Answer.begin(connection.request, pieces, patience=0.001)
        with pytest.raises(EngineDeadError):
            await anext(answer)
        await answer.aclose()
        assert pieces.closed == 1

    run(test)


def test_a_client_that_leaves_before_the_first_piece() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a"], wait=60)
        asyncio.get_running_loop().call_later(0.02, connection.left.set)
        with pytest.raises(ApiError) as caught:
            await Answer.begin(connection.request, pieces)
        assert caught.value.status == 499
        assert (pieces.cancelled, pieces.closed) == (1, 1)

    run(test)


def test_an_answer_that_nobody_reads_can_be_closed() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a"], wait=60)
        answer = await Answer.begin(connection.request, pieces, patience=0.001)
        await answer.aclose()
        assert (pieces.cancelled, pieces.closed) == (1, 1)

    run(test)


def test_a_handler_that_is_cancelled_closes() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a"], wait=60)
        handler = asyncio.ensure_future(Answer.begin(connection.request, pieces))
        await asyncio.sleep(0.02)
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert (pieces.cancelled, pieces.closed) == (1, 1)

    run(test)


def test_work_is_done_while_the_client_is_there() -> None:
    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    async def test(connection: Connection) -> None:
        assert await while_connected(connection.request, work(0.02)) == "done"
        asyncio.get_running_loop().call_later(0.02, connection.left.set)
        with pytest.raises(ApiError):
            await while_connected(connection.request, work(60))

    run(test)


def test_a_response_sends_pieces_and_an_end() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a", b"b"])
        response = StreamedResponse(as_bytes(pieces), "application/x-ndjson", form(), {"x-more": "1"})
        await response({"type": "http"}, connection.receive, connection.send)
        start, *bodies = connection.sent
        headers = dict(start["headers"])
        assert start["status"] == 200
        assert headers[b"content-type"] == b"application/x-ndjson"
        assert headers[b"cache-control"] == b"no-cache"
        assert headers[b"x-more"] == b"1"
        assert b"content-length" not in headers
        assert [(body["body"], body["more_body"]) for body in bodies] == [(b"a", True), (b"b", True), (b"", False)]
        assert pieces.closed == 1

    run(test)


def test_silence_is_broken_only_where_it_is_silent() -> None:
    async def test(connection: Connection) -> None:
        for wait, expected in ((0.0, b"ab"), (0.15, None)):
            connection.sent.clear()
            pieces = Pieces([b"a", b"b"], wait)
            response = StreamedResponse(as_bytes(pieces), "text/event-stream", form(b".", 0.04))
            await response({"type": "http"}, connection.receive, connection.send)
            body = connection.body
            assert body.replace(b".", b"") == b"ab"
            if expected is not None:
                assert body == expected
            else:
                before, between = body.index(b"a"), body.index(b"b") - body.index(b"a") - 1
                assert 1 <= before <= 4 and 1 <= between <= 4

    run(test)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_client_that_leaves_in_the_middle(stuck: bool) -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a"] * 10_000, wait=0.005)
        answer = await Answer.begin(connection.request, pieces)
        response = StreamedResponse(as_bytes(answer), "text/event-stream", form(b"."), answer=answer)
        loop = asyncio.get_running_loop()
        loop.call_later(0.03, setattr, connection, "stuck", stuck)
        loop.call_later(0.06, connection.left.set)
        await response({"type": "http"}, connection.receive, connection.send)
        assert b"a" in connection.body
        assert all(message.get("more_body", True) for message in connection.sent), "no end of an answer that was cut"
        assert pieces.closed >= 1

    run(test)


def test_an_answer_of_which_nothing_was_sent_is_closed() -> None:
    async def test(connection: Connection) -> None:
        pieces = Pieces([b"a"], wait=60)
        answer = await Answer.begin(connection.request, pieces, patience=0.001)
        response = StreamedResponse(as_bytes(answer), "text/event-stream", form(), answer=answer)
        connection.stuck = True  # so that not even the first piece is asked for
        asyncio.get_running_loop().call_later(0.02, connection.left.set)
        await response({"type": "http"}, connection.receive, connection.send)
        assert (pieces.cancelled, pieces.closed) == (1, 1)

    run(test)


def test_errors_in_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    assert error_in_stream(EngineDeadError("secret")).message == "the model is not available at the moment."
    own = ApiError(418, "x")
    assert error_in_stream(own) is own
    with caplog.at_level(logging.ERROR):
        foreign = error_in_stream(KeyError("/secret/path"))
    assert (foreign.status, foreign.kind) == (500, "api_error")
    assert "secret" not in foreign.message
    number = foreign.message.removeprefix("internal error ").rstrip(".")
    assert len(number) == 12 and number in caplog.text and "/secret/path" in caplog.text
