"""Anthropic's messages: answers, whole or as a stream, and counts of tokens.

Beside Anthropic's own model names this server has its one model and its aliases. It does not know how a model writes
thoughts and calls.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.anthropic.blocks import MessageBuilder
from moesaic.server.anthropic.schema import CountTokensBody, MessageAnswer, MessagesBody, TokenCount
from moesaic.server.anthropic.stream import PING_SECONDS, events_response
from moesaic.server.anthropic.translate import to_chat_request
from moesaic.server.bodies import read_body
from moesaic.server.conversation import ChatRequest, Event
from moesaic.server.errors import ApiError
from moesaic.server.names import require_model
from moesaic.server.operation import Operation
from moesaic.server.state import ServerState, state_of
from moesaic.server.streams import Answer, closing, while_connected

__all__ = ["OPERATIONS", "count_tokens", "create_message"]


async def create_message(request: Request) -> Response:
    """`POST /v1/messages`."""
    body = await read_body(request, MessagesBody)
    state = state_of(request)
    conversation = _conversation(state, body)
    number = uuid.uuid4().hex
    shown = body.thinking is None or body.thinking.display != "omitted"
    builder = MessageBuilder(f"msg_{number}", state.model.name, body.max_tokens, shown)
    if body.stream:
        prompt_tokens = await _count(state, conversation)
        answer = await Answer.begin(request, state.chat.chat(conversation, number), PING_SECONDS)
        return events_response(answer, _events(answer, builder, prompt_tokens))
    await while_connected(request, _collect(state, conversation, builder, number))
    return _json(builder.message)


async def count_tokens(request: Request) -> Response:
    """`POST /v1/messages/count_tokens`."""
    body = await read_body(request, CountTokensBody)
    state = state_of(request)
    return _json(TokenCount(await _count(state, _conversation(state, body))))


def _conversation(state: ServerState, body: CountTokensBody) -> ChatRequest:
    require_model(state, body.model)
    conversation = to_chat_request(body)
    if conversation.tools and conversation.tool_choice.mode != "none" and not state.chat.has_tools:
        raise ApiError(400, f"tools: the model '{state.model.name}' calls no tools.", param="tools", code="unsupported")
    return conversation


async def _count(state: ServerState, conversation: ChatRequest) -> int:
    """Tokens of a prompt. A long one takes a while, in which others' answers go on."""
    return len(await asyncio.to_thread(state.chat.encode_chat, conversation))


async def _collect(state: ServerState, conversation: ChatRequest, builder: MessageBuilder, number: str) -> None:
    async with closing(state.chat.chat(conversation, number)) as events:
        async for event in events:
            for _ in builder.add(event):
                pass


async def _events(
    answer: Answer[Event], builder: MessageBuilder, prompt_tokens: int
) -> AsyncGenerator[Mapping[str, Any], None]:
    async with closing(answer):
        for event in builder.start(prompt_tokens):
            yield event
        async for piece in answer:
            for event in builder.add(piece):
                yield event


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


OPERATIONS = (
    Operation(
        "POST",
        "/v1/messages",
        create_message,
        "Answer a conversation (Anthropic)",
        "anthropic",
        request=MessagesBody,
        response=MessageAnswer,
        stream="text/event-stream",
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        "Count the tokens of a conversation (Anthropic)",
        "anthropic",
        request=CountTokensBody,
        response=TokenCount,
    ),
)
