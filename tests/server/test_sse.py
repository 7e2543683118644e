"""Server-sent events: their bytes, keep-alive comments, and that the iterator is closed when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from moesaic.errors import EngineDeadError
from moesaic.server import sse
from moesaic.server.errors import ApiError
from moesaic.server.sse import event, event_stream


class Pieces:
    """Yields what it is told to, with pauses; remembers whether it was closed."""

    def __init__(self, pieces: list[bytes | Exception], pause: float = 0.0) -> None:
        self.pieces, self.pause, self.closed = pieces, pause, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self.pieces:
                await asyncio.sleep(self.pause)
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed = True


class Client:
    """Of an ASGI application: keeps what it got, and goes away after so many messages."""

    def __init__(self, stays_for: int | None = None) -> None:
        self.stays_for, self.gone = stays_for, asyncio.Event()
        self.bodies: list[bytes] = []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.headers = dict(message["headers"])
            return
        self.bodies.append(message["body"])
        if self.stays_for is not None and len(self.bodies) >= self.stays_for:
            self.gone.set()

    async def get(self, pieces: Pieces) -> None:
        request = Request({"type": "http", "headers": []}, self.receive)
        response = await event_stream(request, aiter(pieces), lambda error: event(error.message, "error"))
        await response({"type": "http"}, self.receive, self.send)


def test_events_are_one_line_each() -> None:
    assert event({"a": "x\ny\u2028"}) == b'data: {"a":"x\\ny\xe2\x80\xa8"}\n\n'
    assert event([1], "some.type") == b"event: some.type\ndata: [1]\n\n"


def test_pieces_arrive_in_order_and_the_iterator_is_closed() -> None:
    async def run() -> None:
        client, pieces = Client(), Pieces([b"a", b"b"])
        await client.get(pieces)
        assert client.bodies == [b"a", b"b", b""] and pieces.closed
        assert client.headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in client.headers and b"cache-control" in client.headers

    asyncio.run(run())


def test_no_pieces_at_all() -> None:
    async def run() -> None:
        client = Client()
        await client.get(Pieces([]))
        assert client.bodies == [b""]

    asyncio.run(run())


def test_an_error_before_the_first_piece_is_raised() -> None:
    async def run() -> None:
        pieces = Pieces([EngineDeadError("dead")])
        with pytest.raises(EngineDeadError):
            await Client().get(pieces)
        assert pieces.closed

    asyncio.run(run())


def test_a_later_error_is_the_last_event() -> None:
    async def run() -> None:
        client, pieces = Client(), Pieces([b"a", ApiError(400, "wrong"), b"b"])
        await client.get(pieces)
        assert client.bodies == [b"a", b'event: error\ndata: "wrong"\n\n', b""] and pieces.closed

    asyncio.run(run())


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.02)
    monkeypatch.setattr(sse, "GRACE", 0.01)

    async def run() -> None:
        client, pieces = Client(), Pieces([b"a", ApiError(400, "late")], 0.2)
        await client.get(pieces)
        told = [body for body in client.bodies if not body.startswith(b":")]
        assert told == [b"a", b'event: error\ndata: "late"\n\n', b""]
        before = client.bodies.index(b"a")
        assert before >= 2 and len(client.bodies) - before > 4  # comments before and after the first piece

    asyncio.run(run())


def test_an_error_after_the_grace_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "GRACE", 0.01)

    async def run() -> None:
        client = Client()
        await client.get(Pieces([ApiError(400, "late")], 0.1))
        assert client.bodies == [b'event: error\ndata: "late"\n\n', b""]

    asyncio.run(run())


@pytest.mark.parametrize("stays_for", [1, 3])
def test_a_client_that_goes_away_closes_the_iterator(stays_for: int) -> None:
    async def run() -> None:
        client, pieces = Client(stays_for), Pieces([b"x"] * 1000, 0.001)
        await asyncio.wait_for(client.get(pieces), 5)
        assert pieces.closed and stays_for <= len(client.bodies) <= stays_for + 2

    asyncio.run(run())


def test_a_client_that_goes_before_the_first_piece() -> None:
    async def run() -> None:
        client, pieces = Client(), Pieces([b"x"], 100)
        asking = asyncio.create_task(client.get(pieces))
        await asyncio.sleep(0.02)
        client.gone.set()
        with pytest.raises(ApiError) as error:
            await asyncio.wait_for(asking, 5)
        assert error.value.status == 499 and pieces.closed

    asyncio.run(run())


def test_a_client_that_goes_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "GRACE", 0.01)

    async def run() -> None:
        client, pieces = Client(), Pieces([b"x"], 100)
        asking = asyncio.create_task(client.get(pieces))
        await asyncio.sleep(0.05)
        client.gone.set()
        await asyncio.wait_for(asking, 5)
        assert pieces.closed and client.bodies == []

    asyncio.run(run())
