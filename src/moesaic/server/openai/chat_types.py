"""Bodies of /v1/chat/completions: what is asked, what is answered, whole and in pieces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

from moesaic.server.openai.formats import ResponseFormat
from moesaic.server.openai.logprobs import ChatLogprob
from moesaic.server.openai.sampling import Count, SamplingFields, TopLogprobs
from moesaic.server.openai.tools import Effort, FunctionName, FunctionTool
from moesaic.server.openai.unsupported import (
    OnlyEmpty,
    OnlyFalse,
    OnlyMedium,
    OnlyNull,
    OnlyOne,
    OnlyText,
)
from moesaic.server.openai.usage import StreamOptions, Usage
from moesaic.server.timings import Timings

__all__ = [
    "ChatBody",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatMessage",
    "Delta",
    "FunctionCall",
    "FunctionPiece",
    "InputMessage",
    "NamedTool",
    "Part",
    "ToolBody",
    "ToolCallBody",
    "ToolCallPiece",
]


class Part(Struct, kw_only=True):
    """A part of a message; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct, kw_only=True):
    """A name, and arguments as JSON text."""

    name: str
    arguments: str


class ToolCallBody(Struct, kw_only=True):
    """A call that an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class InputMessage(Struct, kw_only=True):
    """A turn so far; `reasoning_content` (or `reasoning`) is what an assistant thought."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: OnlyNull | UnsetType = UNSET
    function_call: OnlyNull | UnsetType = UNSET


class ToolBody(Struct, kw_only=True):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: FunctionTool


class _Name(Struct, kw_only=True):
    name: FunctionName


class NamedTool(Struct, kw_only=True):
    """The tool that has to be called."""

    type: Literal["function"]
    function: _Name


class ChatBody(SamplingFields, kw_only=True):
    """What /v1/chat/completions takes. Fields that are not here are ignored."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    audio: OnlyNull | UnsetType = UNSET
    modalities: OnlyText | UnsetType = UNSET
    web_search_options: OnlyNull | UnsetType = UNSET
    moderation: OnlyNull | UnsetType = UNSET
    functions: OnlyEmpty | UnsetType = UNSET
    function_call: OnlyEmpty | UnsetType = UNSET
    verbosity: OnlyMedium | UnsetType = UNSET
    best_of: OnlyOne | UnsetType = UNSET
    echo: OnlyFalse | UnsetType = UNSET
    add_special_tokens: OnlyFalse | UnsetType = UNSET
    chat_template: OnlyNull | UnsetType = UNSET
    documents: OnlyEmpty | UnsetType = UNSET
    mm_processor_kwargs: OnlyEmpty | UnsetType = UNSET
    thinking_budget: OnlyNull | UnsetType = UNSET


class ChatLogprobs(Struct, kw_only=True):
    """Of the tokens of text, and beside OpenAI's API of thoughts."""

    content: list[ChatLogprob] | None = None
    refusal: None = None
    reasoning_content: list[ChatLogprob] | UnsetType = UNSET


class ChatMessage(Struct, kw_only=True):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One of `n` answers; `stop_reason` is the text of the request's that stopped it."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None = None


class ChatCompletion(Struct, kw_only=True):
    """All answers at once."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class FunctionPiece(Struct, kw_only=True):
    """The name comes first, then the arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallPiece(Struct, kw_only=True):
    """Of the call at `index`."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionPiece


class Delta(Struct, kw_only=True):
    """What is new in an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPiece] | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    """A piece of one of `n` answers."""

    index: int
    delta: Delta = field(default_factory=Delta)
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: str | UnsetType | None = UNSET


class ChatChunk(Struct, kw_only=True):
    """A piece; with `include_usage`, the last one has no choices but the counts."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
