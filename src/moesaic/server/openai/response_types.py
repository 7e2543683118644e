"""Bodies of /v1/responses: what is asked, and the response with its items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from moesaic.server.openai.chat_types import Part
from moesaic.server.openai.logprobs import ChatLogprob
from moesaic.server.openai.sampling import Count, SamplingFields, TopLogprobs
from moesaic.server.openai.tools import Effort, FunctionName, FunctionTool
from moesaic.server.openai.unsupported import (
    OnlyAuto,
    OnlyDisabled,
    OnlyEmpty,
    OnlyFalse,
    OnlyMedium,
    OnlyNull,
    OnlyOne,
    OnlyStandard,
)
from moesaic.server.timings import Timings

__all__ = [
    "CallItem",
    "InputItem",
    "MessageItem",
    "NamedFunction",
    "OutputItem",
    "OutputText",
    "ReasoningConfig",
    "ReasoningItem",
    "ReasoningText",
    "ResponseBody",
    "ResponseError",
    "ResponseObject",
    "ResponseTool",
    "ResponseUsage",
    "TextConfig",
    "TextFormat",
]

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputItem(Struct, kw_only=True):
    """What was said and done so far: a message, a call, its result, or thoughts, with the fields of that type."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class ResponseTool(FunctionTool, kw_only=True):
    """A tool; there are only functions. Arguments are forced to keep to the schema if `strict` is true."""

    type: Literal["function"]


class NamedFunction(Struct, kw_only=True):
    """The function that has to be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(Struct, kw_only=True):
    """Form of the text; text keeps to a schema whether it is `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class TextConfig(Struct, kw_only=True):
    """What is asked of the text."""

    format: TextFormat | None = None
    verbosity: OnlyMedium | UnsetType = UNSET


class ReasoningConfig(Struct, kw_only=True):
    """What is asked of thoughts; they come whole, whatever summary is asked for."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | UnsetType | None = UNSET
    context: OnlyAuto | UnsetType = UNSET
    mode: OnlyStandard | UnsetType = UNSET


class ResponseBody(SamplingFields, kw_only=True):
    """What /v1/responses takes. Fields that are not here are ignored; `store` is accepted, and nothing is stored."""

    model: str
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: OnlyNull | UnsetType = UNSET
    conversation: OnlyNull | UnsetType = UNSET
    background: OnlyFalse | UnsetType = UNSET
    prompt: OnlyNull | UnsetType = UNSET
    moderation: OnlyNull | UnsetType = UNSET
    context_management: OnlyEmpty | UnsetType = UNSET
    truncation: OnlyDisabled | UnsetType = UNSET
    n: OnlyOne | UnsetType = UNSET
    max_tokens: OnlyNull | UnsetType = UNSET
    response_format: OnlyNull | UnsetType = UNSET


class OutputText(Struct, kw_only=True):
    """Text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] = []


class MessageItem(Struct, kw_only=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputText] = []


class ReasoningText(Struct, kw_only=True):
    """Text of thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thinks; nothing is summed up or encrypted."""

    id: str
    status: ItemStatus = "in_progress"
    summary: list[Any] = []
    content: list[ReasoningText] = []
    encrypted_content: None = None


class CallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model makes."""

    id: str
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | CallItem


class InputTokensDetails(Struct):
    """Of the input's tokens, those that a cache still held; nobody is charged for what it keeps."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """Of the output's tokens, those of thoughts."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Struct):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Struct, kw_only=True):
    """A response, also while it is made; with what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: ReasoningConfig
    store: Literal[False] = False
    temperature: float | None
    text: TextConfig
    tool_choice: str | NamedFunction
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    metadata: dict[str, str]
    timings: Timings | UnsetType = UNSET
