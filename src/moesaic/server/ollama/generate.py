"""Ollama's generate: a prompt through the chat template, or raw.

It does not know how a model writes thoughts.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.bodies import read_body, refuse_unsupported
from moesaic.server.errors import ApiError
from moesaic.server.ndjson import ndjson_response
from moesaic.server.ollama.answers import Piece, chunk_pieces, event_pieces, finish, joined, now
from moesaic.server.ollama.replies import json_response, require_ready
from moesaic.server.ollama.schema import GenerateAnswer, GenerateBody
from moesaic.server.ollama.translate import common_params, prompt_conversation
from moesaic.server.operation import Operation
from moesaic.server.state import ServerState, state_of
from moesaic.server.streams import Answer, closing, while_connected

__all__ = ["OPERATIONS", "generate"]


async def generate(request: Request) -> Response:
    """`POST /api/generate`."""
    body = await read_body(request, GenerateBody)
    state = state_of(request)
    require_ready(state, body.model)
    refuse_unsupported(
        body, {"suffix": (None, ""), "template": (None, ""), "images": (None, []), "context": (None, [])}
    )
    if not body.prompt:
        return json_response(
            GenerateAnswer(model=body.model, created_at=now(), response="", done=True, done_reason="load")
        )
    pieces = _pieces(state, body, body.prompt)
    if body.stream is False:
        async with closing(pieces):
            whole = await while_connected(request, joined(pieces))
        return json_response(_answer(body.model, whole))
    answer = await Answer.begin(request, pieces)
    return ndjson_response(answer, _objects(body.model, answer), "ollama")


def _pieces(state: ServerState, body: GenerateBody, prompt: str) -> AsyncGenerator[Piece, None]:
    number = uuid.uuid4().hex
    if not body.raw:
        return event_pieces(state.chat.chat(prompt_conversation(state, body), number))
    if body.system or body.think:
        param = "system" if body.system else "think"
        raise ApiError(400, f"{param}: a raw prompt goes through no template, so it has no {param}.", param=param)
    return chunk_pieces(state.chat.complete(prompt, common_params(state, body), number))


async def _objects(model: str, answer: Answer[Piece]) -> AsyncGenerator[GenerateAnswer, None]:
    async with closing(answer):
        async for piece in answer:
            yield _answer(model, piece)


def _answer(model: str, piece: Piece) -> GenerateAnswer:
    made = GenerateAnswer(
        model=model,
        created_at=now(),
        response=piece.text,
        thinking=piece.thinking,
        done=False,
        logprobs=piece.logprobs,
    )
    finish(made, piece.last)
    return made


OPERATIONS = (
    Operation(
        "POST",
        "/api/generate",
        generate,
        "Answer a prompt (Ollama)",
        "ollama",
        request=GenerateBody,
        response=GenerateAnswer,
        stream="application/x-ndjson",
    ),
)
