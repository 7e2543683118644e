"""/v1/responses: a conversation's next turn as items, whole or as typed events. No response is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.bodies import read_body
from moesaic.server.conversation import ChatRequest, Finished
from moesaic.server.names import require_model
from moesaic.server.openai.answers import completed, events_of, new_id, reasoning_tokens
from moesaic.server.openai.models import json_response
from moesaic.server.openai.response_input import response_request
from moesaic.server.openai.response_types import (
    ReasoningConfig,
    ResponseBody,
    ResponseObject,
    TextConfig,
    TextFormat,
)
from moesaic.server.openai.response_writer import ResponseWriter
from moesaic.server.operation import Operation
from moesaic.server.sse import event_stream
from moesaic.server.state import ServerState, state_of
from moesaic.server.streams import closing, while_connected

__all__ = ["OPERATIONS"]

_NAMES = {
    "template_arguments": "chat_template_kwargs",
    "grammar": "text.format",
    "prompt": "input",
    "messages": "input",
}
"""Of fields that have another name in a conversation."""


async def create(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    body = await read_body(request, ResponseBody)
    require_model(state, body.model)
    asked = response_request(state.chat, body)
    writer = ResponseWriter(_response(body))
    if not body.stream:
        return json_response(await while_connected(request, _whole(state, asked, writer)))
    return await event_stream(request, _pieces(state, asked, writer), writer.fail)


async def _whole(state: ServerState, asked: ChatRequest, writer: ResponseWriter) -> ResponseObject:
    """The response, when it is complete."""
    async with closing(_pieces(state, asked, writer)) as pieces:
        async for _ in pieces:
            pass
    return writer.response


async def _pieces(state: ServerState, asked: ChatRequest, writer: ResponseWriter) -> AsyncGenerator[bytes, None]:
    """The events of a stream. The first wait for the engine, so that its refusals are errors of HTTP."""
    first = True
    async with events_of(state.chat, asked, writer.response.id, _NAMES) as events:
        async for each in events:
            if first:
                first = False
                yield writer.begin()
            if isinstance(each, Finished):
                writer.reasoning_tokens = await reasoning_tokens(state.chat, writer.thoughts)
            piece = writer.add(each)
            if piece:
                yield piece
    if writer.response.status == "in_progress":
        completed(None)


def _response(body: ResponseBody) -> ResponseObject:
    """A response as it begins."""
    text = body.text or TextConfig()
    text.format = text.format or TextFormat(type="text")
    return ResponseObject(
        id=new_id("resp_"),
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=body.reasoning or ReasoningConfig(),
        temperature=body.temperature,
        text=text,
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
        metadata=body.metadata or {},
    )


OPERATIONS = (
    Operation(
        "POST",
        "/v1/responses",
        create,
        "Answer a conversation with items",
        "openai",
        ResponseBody,
        ResponseObject,
        "text/event-stream",
    ),
)
