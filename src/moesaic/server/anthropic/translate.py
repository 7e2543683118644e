"""Anthropic's requests as conversations.

It knows neither HTTP nor how answers are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.server.anthropic.history import input_messages
from moesaic.server.anthropic.schema import CountTokensBody, MessagesBody, ToolBody, ToolChoiceBody
from moesaic.server.bodies import refuse_unsupported
from moesaic.server.conversation import ChatRequest, Tool, ToolChoice
from moesaic.server.errors import ApiError

__all__ = ["to_chat_request"]

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_HARMLESS_EDITS = ("clear_thinking_20251015",)


def to_chat_request(body: CountTokensBody) -> ChatRequest:
    """A conversation of a body; if the last turn is the assistant's, it is gone on with.

    Raises:
        ApiError: 400 for what is unsupported or does not fit together.
        RequestError: a sampling parameter is out of range.
    """
    refuse_unsupported(body, {"container": (None,), "mcp_servers": (None, [])})
    for edit in (body.context_management and body.context_management.edits) or ():
        if edit.type not in _HARMLESS_EDITS:
            raise _unsupported("context_management.edits", f"the edit '{edit.type[:100]}'")
    messages = input_messages(body.system, body.messages)
    tools = tuple(_tools(body.tools or ()))
    choice = _tool_choice(body.tool_choice, tools)
    parallel = not (body.tool_choice and body.tool_choice.disable_parallel_tool_use)
    return ChatRequest(
        messages=messages,
        params=_params(body),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        template_arguments=_template_arguments(body),
        continue_last=messages[-1].role == "assistant",
    )


def _unsupported(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what} is not supported by this server.", param=param, code="unsupported")


def _tools(bodies: Sequence[ToolBody]) -> Iterable[Tool]:
    names: set[str] = set()
    for index, body in enumerate(bodies):
        where = f"tools[{index}]"
        if body.type not in (None, "custom"):
            raise _unsupported(f"{where}.type", f"'{body.type[:100]}' (only tools of type 'custom' are)")
        if body.defer_loading:
            raise _unsupported(f"{where}.defer_loading", "loading a tool later")
        if body.allowed_callers is not None and "direct" not in body.allowed_callers:
            raise _unsupported(f"{where}.allowed_callers", "a tool that only other tools call")
        if body.input_examples:
            raise _unsupported(f"{where}.input_examples", "examples of inputs")
        if not _TOOL_NAME.fullmatch(body.name):
            raise ApiError(400, f"{where}.name: expected 1 to 128 letters, digits, '_' and '-'.", param=f"{where}.name")
        if body.name in names:
            raise ApiError(400, f"{where}.name: there are two tools '{body.name}'.", param=f"{where}.name")
        if body.input_schema is None or body.input_schema.get("type") != "object":
            raise ApiError(
                400,
                f'{where}.input_schema: expected a JSON schema with "type": "object".',
                param=f"{where}.input_schema",
            )
        names.add(body.name)
        yield Tool(body.name, body.description or "", body.input_schema, bool(body.strict))


def _tool_choice(body: ToolChoiceBody | None, tools: Sequence[Tool]) -> ToolChoice:
    if body is None or body.type == "auto":
        return ToolChoice("auto")
    if body.type == "none":
        return ToolChoice("none")
    if body.type == "any":
        if not tools:
            raise ApiError(400, "tool_choice: 'any' needs tools, but there are none.", param="tool_choice")
        return ToolChoice("required")
    if body.name is None or body.name not in {tool.name for tool in tools}:
        raise ApiError(400, "tool_choice.name: expected the name of one of the tools.", param="tool_choice.name")
    return ToolChoice("named", body.name)


def _params(body: CountTokensBody) -> SamplingParams:
    if not isinstance(body, MessagesBody):
        return SamplingParams(max_tokens=0)
    return SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop=tuple(body.stop_sequences or ()),
        grammar=_grammar(body),
    )


def _grammar(body: MessagesBody) -> Grammar | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    return Grammar("json_schema", msgspec.json.encode(body.output_config.format.schema).decode())


def _template_arguments(body: CountTokensBody) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if body.thinking is not None:
        arguments["enable_thinking"] = arguments["thinking"] = body.thinking.type != "disabled"
    if body.output_config is not None and body.output_config.effort is not None:
        arguments["reasoning_effort"] = _EFFORTS[body.output_config.effort]
    return arguments
