"""A chat with a script, an application of nothing but routes, and a client: what the tests of these routes need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx
import openai
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.outputs import Chunk, RequestStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import GenerationError, RequestError
from moesaic.server.conversation import ChatRequest, Event, Finished, TextDelta, ToolCallDelta
from moesaic.server.errors import ApiError, error_body, to_api_error
from moesaic.server.openai import chat, completions, models, responses
from moesaic.server.operation import Operation
from moesaic.server.plain import tokens
from moesaic.server.state import ModelInfo, ServerState

STATS = RequestStats(20, 5, 11, 0.001, 0.3, 0.5, 3, 4)
CALLS: tuple[Event, ...] = (
    ToolCallDelta(0, 0, id="call_a", name="weather"),
    ToolCallDelta(0, 0, '{"town":'),
    ToolCallDelta(0, 0, '"Ulm"}'),
    ToolCallDelta(0, 1, "{}", id="call_b", name="time"),
    Finished(0, "tool_calls", STATS),
)
"""The end of an answer that calls two tools."""
OPERATIONS: tuple[Operation, ...] = (
    *models.OPERATIONS,
    *chat.OPERATIONS,
    *completions.OPERATIONS,
    *responses.OPERATIONS,
    *tokens.OPERATIONS,
)


@dataclass
class ScriptedChat:
    """Plays a script, or says what the engine says; a prompt's tokens are the code points of its text."""

    engine: ScriptedEngine
    has_reasoning: bool = True
    has_tools: bool = True
    script: Sequence[Event] | None = None
    asked: list[ChatRequest] = field(default_factory=list)

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncIterator[Event]:
        self.asked.append(request)
        if self.script is not None:
            for event in self.script:
                yield event
            return
        chunks = self.engine.generate(self.encode_chat(request), request.params, request_id=request_id)
        try:
            async for chunk in chunks:
                yield TextDelta(chunk.index, chunk.text, chunk.logprobs)
                if chunk.finish_reason is not None:
                    assert chunk.stats is not None
                    yield Finished(chunk.index, chunk.finish_reason, chunk.stats)
        finally:
            await chunks.aclose()

    def complete(self, prompt: str | Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return self.engine.generate(ids, params, request_id=request_id)

    def encode_chat(self, request: ChatRequest) -> list[int]:
        return self.encode("".join(f"<{message.role}>{message.content}" for message in request.messages))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        if any(each > 0x10FFFF for each in ids):
            raise RequestError("a number that is no token.", "tokens")
        return "".join(chr(each) for each in ids if each)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)


@dataclass
class Served:
    """An application and its parts; `client` is the official one."""

    engine: ScriptedEngine = field(default_factory=ScriptedEngine)

    def __post_init__(self) -> None:
        self.chat = ScriptedChat(self.engine)
        self.model = ModelInfo("tiny/moe", created=7, context_length=4096, digest="0123456789abcdef0123")
        self.app = Starlette(
            routes=[Route(each.path, each.handler, methods=[each.method]) for each in OPERATIONS],
            exception_handlers={ApiError: _rendered, GenerationError: _rendered},
        )
        self.app.state.moesaic = ServerState(self.engine, self.chat, self.model, aliases=("tiny",))
        transport = httpx.ASGITransport(self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://server")
        self.client = openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=self.http, max_retries=0
        )


async def _rendered(request: Request, error: Exception) -> Response:
    known = to_api_error(error)
    if known is None:
        raise error
    style = next((each.style for each in OPERATIONS if each.path == request.url.path), "openai")
    return JSONResponse(error_body(known, style), known.status)
