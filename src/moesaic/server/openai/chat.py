"""/v1/chat/completions: a conversation's next turn, whole or in pieces."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.bodies import read_body
from moesaic.server.conversation import ChatRequest, Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.errors import error_body
from moesaic.server.names import require_model
from moesaic.server.openai.answers import WholeAnswer, completed, events_of, new_id, reasoning_tokens
from moesaic.server.openai.chat_input import chat_request
from moesaic.server.openai.chat_types import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    FunctionCall,
    FunctionPiece,
    ToolCallBody,
    ToolCallPiece,
)
from moesaic.server.openai.logprobs import chat_logprobs
from moesaic.server.openai.models import fingerprint, json_response
from moesaic.server.openai.usage import make_usage
from moesaic.server.operation import Operation
from moesaic.server.sse import DONE, event, event_stream
from moesaic.server.state import ServerState, state_of
from moesaic.server.streams import while_connected
from moesaic.server.timings import make_timings

__all__ = ["OPERATIONS"]

_NAMES = {"template_arguments": "chat_template_kwargs", "grammar": "response_format", "prompt": "messages"}
"""Of fields that have another name in a conversation."""


async def create(request: Request) -> Response:
    """WholeAnswer a conversation."""
    state = state_of(request)
    body = await read_body(request, ChatBody)
    require_model(state, body.model)
    asked = chat_request(state.chat, body)
    if not body.stream:
        return json_response(await while_connected(request, _whole(state, body, asked)))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    pieces = _pieces(state, body.model, asked, usage)
    return await event_stream(request, pieces, lambda error: event(error_body(error, "openai")))


async def _whole(state: ServerState, body: ChatBody, asked: ChatRequest) -> ChatCompletion:
    """All answers, when they are complete."""
    identity, created = new_id("chatcmpl-"), int(time.time())
    answers = [WholeAnswer() for _ in range(asked.params.n)]
    async with events_of(state.chat, asked, identity, _NAMES) as events:
        async for each in events:
            answers[each.choice].add(each)
    choices = [_choice(index, answer, bool(body.logprobs)) for index, answer in enumerate(answers)]
    stats = [answer.stats for answer in answers]
    thoughts = sum([await reasoning_tokens(state.chat, answer.reasoning) for answer in answers])
    return ChatCompletion(
        id=identity,
        created=created,
        model=body.model,
        system_fingerprint=fingerprint(state),
        choices=choices,
        usage=make_usage([stats], thoughts),
        timings=make_timings([stats]),
    )


def _choice(index: int, answer: WholeAnswer, logprobs: bool) -> ChatChoice:
    """A complete answer in the API's form."""
    reason = completed(answer.finished.reason if answer.finished is not None else None)
    text, thoughts = "".join(answer.text), "".join(answer.reasoning)
    calls = [
        ToolCallBody(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in answer.tool_calls
    ]
    message = ChatMessage(
        content=None if calls and not text else text,
        reasoning_content=thoughts or UNSET,
        tool_calls=calls or UNSET,
    )
    own = ChatLogprobs(
        content=chat_logprobs(answer.text_logprobs),
        reasoning_content=chat_logprobs(answer.reasoning_logprobs) or UNSET,
    )
    stop = answer.finished.stop if answer.finished is not None else None
    return ChatChoice(
        index=index, message=message, logprobs=own if logprobs else None, finish_reason=reason, stop_reason=stop
    )


async def _pieces(state: ServerState, model: str, asked: ChatRequest, usage: bool) -> AsyncGenerator[bytes, None]:
    """Answers in pieces; counts and times with the last."""
    chunk = ChatChunk(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=model,
        system_fingerprint=fingerprint(state),
        choices=[],
        usage=None if usage else UNSET,
    )
    begun: set[int] = set()
    thoughts: defaultdict[int, list[str]] = defaultdict(list)
    ended: list[Finished] = []
    async with events_of(state.chat, asked, chunk.id, _NAMES) as events:
        async for each in events:
            if each.choice not in begun:
                begun.add(each.choice)
                chunk.choices = [ChatChunkChoice(index=each.choice, delta=Delta(role="assistant", content=""))]
                yield event(chunk)
            if isinstance(each, ReasoningDelta):
                thoughts[each.choice].append(each.text)
            elif isinstance(each, Finished):
                completed(each.reason)
                ended.append(each)
                if len(ended) == asked.params.n:
                    chunk.timings = make_timings([[last.stats for last in ended]])
            piece = _piece(each)
            if piece is not None:
                chunk.choices = [piece]
                yield event(chunk)
    if len(ended) < asked.params.n:
        completed(None)
    if usage:
        count = sum([await reasoning_tokens(state.chat, pieces) for pieces in thoughts.values()])
        chunk.choices, chunk.usage = [], make_usage([[last.stats for last in ended]], count)
        yield event(chunk)
    yield DONE


def _piece(each: Event) -> ChatChunkChoice | None:
    """An event in the API's form; None if it says nothing."""
    match each:
        case TextDelta():
            if not each.text and not each.logprobs:
                return None
            logprobs = ChatLogprobs(content=chat_logprobs(each.logprobs)) if each.logprobs else None
            return ChatChunkChoice(index=each.choice, delta=Delta(content=each.text), logprobs=logprobs)
        case ReasoningDelta():
            if not each.text and not each.logprobs:
                return None
            logprobs = ChatLogprobs(reasoning_content=chat_logprobs(each.logprobs)) if each.logprobs else None
            return ChatChunkChoice(index=each.choice, delta=Delta(reasoning_content=each.text), logprobs=logprobs)
        case ToolCallDelta():
            function = FunctionPiece(name=each.name or UNSET, arguments=each.arguments)
            begins = each.id is not None
            call = ToolCallPiece(
                index=each.call, id=each.id or UNSET, type="function" if begins else UNSET, function=function
            )
            return ChatChunkChoice(index=each.choice, delta=Delta(tool_calls=[call]))
        case Finished():
            return ChatChunkChoice(index=each.choice, finish_reason=completed(each.reason), stop_reason=each.stop)


OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        create,
        "WholeAnswer a conversation",
        "openai",
        ChatBody,
        ChatCompletion,
        "text/event-stream",
    ),
)
