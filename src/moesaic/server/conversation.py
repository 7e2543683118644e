"""A conversation and its answer, without the form of any API: every API translates into these and out of them.

It knows no HTTP and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from moesaic.engine.serving.outputs import RequestStats, TokenLogprob
from moesaic.engine.serving.params import SamplingParams

__all__ = [
    "ChatRequest",
    "Event",
    "Finished",
    "Message",
    "ReasoningDelta",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made.

    Attributes:
        id: of the call, unique in a conversation.
        name: of the tool.
        arguments: JSON text, as the model wrote it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        content: plain text, never special tokens.
        reasoning: what an assistant thought before it answered, if it is given back.
        tool_calls: of an assistant.
        tool_call_id: of a tool's result, the call that it answers.
        name: of a tool or speaker.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of letters, digits, `_` and `-`, at most 64.
        description: for the model.
        parameters: JSON schema of its arguments.
        strict: whether arguments are forced to keep to the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: "auto", "none", "required" (some tool), or "named" (this one)."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to go on with.

    Attributes:
        messages: so far, at least one.
        params: how the answer is chosen.
        tools: that may be called.
        tool_choice: whether they are.
        parallel_tool_calls: whether several calls may be made in one turn.
        template_arguments: for the chat template (`enable_thinking`, `reasoning_effort`, ...).
        continue_last: go on with the last message, an assistant's, instead of beginning a new one.
    """

    messages: tuple[Message, ...]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    continue_last: bool = False


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of answer `choice`; logprobs of all its new tokens if they were asked for."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """New text that the model thinks before it answers."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A call begins (with id and name), or more of its arguments (then only these)."""

    choice: int
    call: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer `choice` is complete.

    Attributes:
        choice: which.
        reason: why it ended.
        stats: counts and times of it.
        stop: the text of the request's that stopped it, if one did.
    """

    choice: int
    reason: Literal["stop", "length", "tool_calls", "cancelled", "error"]
    stats: RequestStats
    stop: str | None = None


Event = TextDelta | ReasoningDelta | ToolCallDelta | Finished
