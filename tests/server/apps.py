"""Applications for tests: small operations behind the real guard, and a driver for what no HTTP client would send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.params import SamplingParams
from moesaic.server.app import build_app
from moesaic.server.operation import Operation, Style
from moesaic.server.options import ServerOptions
from moesaic.server.routes import all_operations
from moesaic.server.state import Chat, ModelInfo, ServerState, state_of


async def echo(request: Request) -> Response:
    """How many bytes came."""
    return JSONResponse({"length": len(await request.body())})


async def stream(request: Request) -> Response:
    """The engine's words, a line each."""
    engine = state_of(request).engine

    async def lines() -> AsyncIterator[str]:
        async for chunk in engine.generate([1], SamplingParams()):
            yield chunk.text + "\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def whole(request: Request) -> Response:
    """The engine's words, all at once."""
    chunks = [chunk.text async for chunk in state_of(request).engine.generate([1], SamplingParams())]
    return JSONResponse({"text": "".join(chunks)})


async def broken(request: Request) -> Response:
    """Fails as libraries do."""
    raise ValueError("secret of a library")


def post(path: str, handler: Any = echo, style: Style = "openai") -> Operation:
    return Operation("POST", path, handler, "a test", style)


TEST_OPERATIONS = (
    post("/v1/echo"),
    post("/v1/messages/echo", style="anthropic"),
    post("/api/echo", style="ollama"),
    post("/stream", stream, "plain"),
    post("/whole", whole, "plain"),
    post("/broken", broken),
    post("/v1/messages/broken", broken, "anthropic"),
)


def make_state(engine: ScriptedEngine | None = None) -> ServerState:
    return ServerState(engine or ScriptedEngine(), cast(Chat, None), ModelInfo("demo"))


def make_app(
    options: ServerOptions | None = None,
    engine: ScriptedEngine | None = None,
    operations: Sequence[Operation] = TEST_OPERATIONS,
) -> Starlette:
    """The real application's own routes, and the small ones."""
    options = options or ServerOptions()
    return build_app(make_state(engine), options, [*all_operations(options), *operations])


def call(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, as a client would send it."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 5), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8671", timeout=10) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


class Connection:
    """A client of one request that sends and leaves when it likes."""

    def __init__(self, path: str, headers: dict[str, str] | None = None, method: str = "POST") -> None:
        named = {"host": "localhost", **(headers or {})}
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8671),
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.received = 0

    def send(self, body: bytes, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def run(self, app: Starlette) -> None:
        async def receive() -> dict[str, Any]:
            message = await self.incoming.get()
            self.received += len(message.get("body", b""))
            return message

        async def send(message: Any) -> None:
            self.sent.append(message)

        await app(self.scope, receive, send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}
