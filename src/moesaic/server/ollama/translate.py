"""Ollama's requests as conversations.

It knows neither HTTP nor how answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from moesaic.engine.serving.params import SamplingParams
from moesaic.server.bodies import refuse_unsupported
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolCall
from moesaic.server.errors import ApiError
from moesaic.server.ollama.options import sampling_params
from moesaic.server.ollama.schema import ChatBody, GenerateBody, Think, ToolBody, Turn
from moesaic.server.state import ServerState

__all__ = ["chat_conversation", "common_params", "prompt_conversation"]


def common_params(state: ServerState, body: ChatBody | GenerateBody) -> SamplingParams:
    """How a request is answered.

    Raises:
        ApiError: 400 naming what is unsupported or out of range.
    """
    refuse_unsupported(body, {"truncate": (None, False), "shift": (None, False)})
    logprobs = None
    if body.logprobs or body.top_logprobs:
        logprobs = body.top_logprobs or 0
    return sampling_params(body.options, body.format, logprobs, state.engine.context_length)


def chat_conversation(state: ServerState, body: ChatBody) -> ChatRequest:
    """A conversation of a body with messages; if the last turn is the assistant's, it is gone on with.

    Raises:
        ApiError: 400 for what is unsupported or does not fit together.
    """
    params = common_params(state, body)
    if body.tools and not state.chat.has_tools:
        raise ApiError(400, f"'{body.model}' does not support tools.", param="tools", code="unsupported")
    messages = _messages(body.messages or ())
    last = messages[-1]
    return ChatRequest(
        messages=messages,
        params=params,
        tools=_tools(body.tools or ()),
        template_arguments=_template_arguments(state, body.model, body.think),
        continue_last=last.role == "assistant" and not last.tool_calls,
    )


def prompt_conversation(state: ServerState, body: GenerateBody) -> ChatRequest:
    """A conversation of a prompt and a system's text.

    Raises:
        ApiError: 400 for what is unsupported.
    """
    params = common_params(state, body)
    system = (Message("system", body.system),) if body.system else ()
    return ChatRequest(
        messages=(*system, Message("user", body.prompt or "")),
        params=params,
        template_arguments=_template_arguments(state, body.model, body.think),
    )


def _template_arguments(state: ServerState, model: str, think: Think | None) -> dict[str, Any]:
    if think is None:
        return {}
    if think is not False and not state.chat.has_reasoning:
        raise ApiError(400, f"'{model}' does not support thinking.", param="think", code="unsupported")
    thinks = think is not False
    arguments: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}  # templates have the one or the other
    if isinstance(think, str):
        arguments["reasoning_effort"] = "high" if think == "max" else think
    return arguments


def _tools(bodies: Sequence[ToolBody]) -> tuple[Tool, ...]:
    made: dict[str, Tool] = {}
    for index, body in enumerate(bodies):
        function, where = body.function, f"tools[{index}].function.name"
        if function.name in made or function.name.endswith("\n"):  # which the pattern of the type lets pass
            raise ApiError(400, f"{where}: expected a name of its own, in letters, digits, '_' and '-'.", param=where)
        parameters = function.parameters or {"type": "object"}
        made[function.name] = Tool(function.name, function.description or "", parameters)
    return tuple(made.values())


def _messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Turns; calls without an id get one, and results belong to the first call of their name that has none yet."""
    messages: list[Message] = []
    open_calls: list[ToolCall] = []
    count = 0
    for index, turn in enumerate(turns):
        if turn.images:
            where = f"messages[{index}].images"
            raise ApiError(400, f"{where}: images are not supported by this server.", param=where, code="unsupported")
        calls = []
        for call in turn.tool_calls or ():
            arguments = msgspec.json.encode(call.function.arguments).decode()
            calls.append(ToolCall(call.id or f"call_{count}", call.function.name, arguments))
            count += 1
        open_calls.extend(calls)
        answered = _answered(turn, open_calls) if turn.role == "tool" else None
        if answered is not None:
            open_calls.remove(answered)
        messages.append(
            Message(
                turn.role,
                turn.content or "",
                turn.thinking or None,
                tuple(calls),
                tool_call_id=turn.tool_call_id or (answered.id if answered else None),
                name=turn.tool_name or (answered.name if answered else None),
            )
        )
    return tuple(messages)


def _answered(turn: Turn, calls: Sequence[ToolCall]) -> ToolCall | None:
    for call in calls:
        if turn.tool_call_id is not None:
            if call.id == turn.tool_call_id:
                return call
        elif turn.tool_name in (None, call.name):
            return call
    return None
