"""A chat that answers with scripted events, and an application of some operations on a port of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.outputs import Chunk, RequestStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import MoesaicError, RequestError
from moesaic.server.conversation import ChatRequest, Event, Finished, TextDelta
from moesaic.server.errors import ApiError, error_body, to_api_error
from moesaic.server.operation import Operation
from moesaic.server.state import ModelInfo, ServerState

T = TypeVar("T")
STATS = RequestStats(12, 5, 7, 0.01, 0.1, 0.2)
"""Of a scripted answer."""


@dataclass
class ScriptedChat:
    r"""Answers with `events`, or without any with what the engine says; remembers what it was asked.

    A prompt's tokens are the code points of "role:content\n" of all turns.
    """

    engine: ScriptedEngine
    events: Sequence[Event] = ()
    has_reasoning: bool = True
    has_tools: bool = True
    refuse: str = ""  # as a template does
    wait: float = 0.0  # before the first event
    asked: list[ChatRequest] = field(default_factory=list)
    completed: list[tuple[str | list[int], SamplingParams]] = field(default_factory=list)
    kept: list[AsyncGenerator[Any, None]] = field(default_factory=list)

    def chat(self, request: ChatRequest, request_id: str) -> AsyncIterator[Event]:
        return self._keep(self._events(request, request_id))

    async def _events(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        prompt = self.encode_chat(request)
        await asyncio.sleep(self.wait)
        if self.events:
            for event in self.events:
                await asyncio.sleep(0)
                yield event
            return
        pieces = self.engine.generate(prompt, request.params, request_id=request_id)
        try:
            async for chunk in pieces:
                yield TextDelta(chunk.index, chunk.text, chunk.logprobs)
                if chunk.finish_reason is not None:
                    assert chunk.stats is not None
                    stop = chunk.stop if isinstance(chunk.stop, str) else None
                    yield Finished(chunk.index, chunk.finish_reason, chunk.stats, stop)
        finally:
            await pieces.aclose()

    def complete(self, prompt: str | Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        return self._keep(self._chunks(prompt, params, request_id))

    async def _chunks(
        self, prompt: str | Sequence[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[Chunk, None]:
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.completed.append((prompt if isinstance(prompt, str) else ids, params))
        pieces = self.engine.generate(ids, params, request_id=request_id)
        try:
            async for chunk in pieces:
                yield chunk
        finally:
            await pieces.aclose()

    def _keep(self, answer: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Hold on to it, so that nothing but `aclose` ends it."""
        self.kept.append(answer)
        return answer

    def encode_chat(self, request: ChatRequest) -> list[int]:
        if self.refuse:
            raise RequestError(self.refuse, "messages")
        return self.encode("".join(f"{each.role}:{each.content}\n" for each in request.messages))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: Sequence[int]) -> str:
        if not all(0 <= each < 0xD800 for each in ids):
            raise RequestError("there is no such token.", "tokens")
        return "".join(map(chr, ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)


def scripted_state(*events: Event) -> tuple[ServerState, ScriptedChat]:
    """A state whose chat answers with `events`, if there are any."""
    engine = ScriptedEngine()
    chat = ScriptedChat(engine, events)
    model = ModelInfo(
        "demo",
        created=1_700_000_000,
        path="/models/demo.gguf",
        family="qwen3_moe",
        container="gguf",
        format="Q4_K",
        parameters=30_532_122_624,
        nbytes=17_000,
        context_length=4096,
        template="{{ x }}",
        digest="ab12",
    )
    return ServerState(engine, chat, model, ("claude-anything", "other:7b")), chat


def application(state: ServerState, operations: Sequence[Operation]) -> Starlette:
    """The routes and the form of errors, nothing else."""
    styles = {operation.path: operation.style for operation in operations}

    async def failed(request: Request, error: Exception) -> Response:
        known = to_api_error(error)
        assert known is not None
        headers = {} if known.retry_after is None else {"retry-after": str(known.retry_after)}
        body = msgspec.json.encode(error_body(known, styles[request.url.path]))
        return Response(body, known.status, headers, "application/json")

    routes = [Route(each.path, each.handler, methods=[each.method]) for each in operations]
    app = Starlette(routes=routes, exception_handlers={ApiError: failed, MoesaicError: failed})
    app.state.moesaic = state
    return app


@contextmanager
def serving(state: ServerState, operations: Sequence[Operation]) -> Iterator[str]:
    """Serve on a free port of the loopback interface; gives the address."""
    config = uvicorn.Config(application(state, operations), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
