"""Pieces over real sockets, by their short way and without it: the same bytes, no more than a client takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moesaic.errors import EngineDeadError
from moesaic.server.errors import ApiError
from moesaic.server.listening import bind, make_web_server
from moesaic.server.options import ServerOptions
from moesaic.server.pieces import PIECES
from moesaic.server.streams import Form, StreamedResponse

HEAD = b"host: localhost\r\ncontent-length: 0\r\n\r\n"


class Source:
    """Pieces of an answer, and how many of them were asked for."""

    def __init__(self, pieces: list[bytes], error: Exception | None = None, pause: float = 0.0) -> None:
        self.pieces, self.error, self.pause = pieces, error, pause
        self.given, self.closed, self.short = 0, asyncio.Event(), False

    async def make(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self.pieces:
                self.given += 1
                await asyncio.sleep(self.pause)
                yield piece
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


@asynccontextmanager
async def served(source: Source) -> AsyncIterator[int]:
    """The port of a server that answers with a source."""

    async def answer(request: Request) -> Response:
        source.short = PIECES in request.scope.get("extensions", {})

        def failed(error: ApiError) -> bytes:
            return error.message.encode()

        return StreamedResponse(source.make(), "text/event-stream", Form(bytes, failed))

    listener = bind("127.0.0.1", 0)
    app = Starlette(routes=[Route("/", answer, methods=["POST"])])
    web = make_web_server(app, ServerOptions(port=0))
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        web.should_exit = True
        await asyncio.wait_for(serving, 10)
        listener.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(limited())


async def ask(port: int, request: bytes) -> bytes:
    """The answer until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def test_pieces_are_chunks() -> None:
    async def test() -> None:
        source = Source([b"one", b"", b"x" * 300])
        async with served(source) as port:
            head, _, body = (await ask(port, b"POST / HTTP/1.1\r\nconnection: close\r\n" + HEAD)).partition(b"\r\n\r\n")
        assert source.short
        assert b"transfer-encoding: chunked" in head.lower() and b"content-length" not in head.lower()
        assert body == b"3\r\none\r\n" + b"12c\r\n" + b"x" * 300 + b"\r\n" + b"0\r\n\r\n"

    run(test)


def test_a_client_that_knows_no_chunks_gets_none() -> None:
    async def test() -> None:
        source = Source([b"one", b"two"])
        async with served(source) as port:
            head, _, body = (await ask(port, b"POST / HTTP/1.0\r\n" + HEAD)).partition(b"\r\n\r\n")
        assert not source.short
        assert b"chunked" not in head.lower() and body == b"onetwo"

    run(test)


def test_a_connection_is_used_again_and_errors_are_pieces() -> None:
    async def test() -> None:
        source = Source([b"one"], EngineDeadError("secret"))
        async with served(source) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(3):
                answer = await client.post("/")
                assert answer.text == "onethe model is not available at the moment."
            stream = answer.extensions["network_stream"].get_extra_info("client_addr")
            assert (await client.post("/")).extensions["network_stream"].get_extra_info("client_addr") == stream

    run(test)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_no_more_is_made_than_a_client_takes(version: bytes) -> None:
    async def test() -> None:
        source = Source([b"x" * 50_000] * 10_000)
        async with served(source) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
            writer.write(b"POST / HTTP/" + version + b"\r\n" + HEAD)
            await reader.readuntil(b"\r\n\r\n")
            given = -1
            while given != source.given:
                given = source.given
                await asyncio.sleep(0.3)
            assert 0 < given < 500  # what buffers of the system hold
            for _ in range(200):
                await reader.readexactly(50_000)
            await asyncio.sleep(0.2)
            assert given < source.given < given + 500
            writer.close()
            await asyncio.wait_for(source.closed.wait(), 5)
            assert source.given < 1000

    run(test)


def test_a_client_that_leaves_ends_the_answer() -> None:
    async def test() -> None:
        source = Source([b"x"] * 10_000, pause=0.002)
        async with served(source) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\n" + HEAD)
            await reader.readuntil(b"\r\n\r\n")
            writer.close()
            await asyncio.wait_for(source.closed.wait(), 5)
        assert source.given < 2000

    run(test)
