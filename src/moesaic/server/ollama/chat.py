"""Ollama's chat.

It does not know how a model writes thoughts and calls.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.bodies import read_body
from moesaic.server.ndjson import ndjson_response
from moesaic.server.ollama.answers import Piece, event_pieces, finish, joined, now
from moesaic.server.ollama.replies import json_response, require_ready
from moesaic.server.ollama.schema import ChatAnswer, ChatBody, OutputMessage
from moesaic.server.ollama.translate import chat_conversation
from moesaic.server.operation import Operation
from moesaic.server.state import state_of
from moesaic.server.streams import Answer, closing, while_connected

__all__ = ["OPERATIONS", "chat"]


async def chat(request: Request) -> Response:
    """`POST /api/chat`."""
    body = await read_body(request, ChatBody)
    state = state_of(request)
    require_ready(state, body.model)
    if not body.messages:
        message = OutputMessage(role="assistant", content="")
        return json_response(
            ChatAnswer(model=body.model, created_at=now(), message=message, done=True, done_reason="load")
        )
    conversation = chat_conversation(state, body)
    pieces = event_pieces(state.chat.chat(conversation, uuid.uuid4().hex))
    if body.stream is False:
        async with closing(pieces):
            whole = await while_connected(request, joined(pieces))
        return json_response(_answer(body.model, whole))
    answer = await Answer.begin(request, pieces)
    return ndjson_response(answer, _objects(body.model, answer), "ollama")


async def _objects(model: str, answer: Answer[Piece]) -> AsyncGenerator[ChatAnswer, None]:
    async with closing(answer):
        async for piece in answer:
            yield _answer(model, piece)


def _answer(model: str, piece: Piece) -> ChatAnswer:
    message = OutputMessage(role="assistant", content=piece.text, thinking=piece.thinking, tool_calls=piece.calls)
    made = ChatAnswer(model=model, created_at=now(), message=message, done=False, logprobs=piece.logprobs)
    finish(made, piece.last)
    return made


OPERATIONS = (
    Operation(
        "POST",
        "/api/chat",
        chat,
        "Answer a conversation (Ollama)",
        "ollama",
        request=ChatBody,
        response=ChatAnswer,
        stream="application/x-ndjson",
    ),
)
