"""The JSON of Anthropic's messages API, as far as this server takes it.

Source: Anthropic's API reference (Messages, Count tokens, Streaming). Fields that make no difference to the answer
are not listed, and so are accepted: cache_control, metadata, service_tier, inference_geo, speed, diagnostics. It does
not know what conversations become of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from moesaic.server.timings import Timings

__all__ = [
    "AnyBlock",
    "CountTokensBody",
    "DocumentBlock",
    "ImageBlock",
    "InputMessage",
    "MessageAnswer",
    "MessagesBody",
    "OtherBlock",
    "OutputConfig",
    "RedactedThinkingBlock",
    "TextBlock",
    "Thinking",
    "ThinkingBlock",
    "TokenCount",
    "ToolBody",
    "ToolChoiceBody",
    "ToolResultBlock",
    "ToolUseBlock",
    "Usage",
]


class TextBlock(Struct, tag="text", tag_field="type"):
    """Text."""

    text: str


class ThinkingBlock(Struct, tag="thinking", tag_field="type"):
    """What an assistant thought; the signature is opaque to clients, and not checked."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, tag="redacted_thinking", tag_field="type"):
    """Thoughts that only another server can read; accepted in a history and left out."""

    data: str = ""


class ToolUseBlock(Struct, tag="tool_use", tag_field="type"):
    """A call."""

    id: str
    name: str
    input: dict[str, Any]


class ImageBlock(Struct, tag="image", tag_field="type"):
    """Refused."""


class DocumentBlock(Struct, tag="document", tag_field="type"):
    """Refused."""


class SearchResultBlock(Struct, tag="search_result", tag_field="type"):
    """Refused."""


class ServerToolUseBlock(Struct, tag="server_tool_use", tag_field="type"):
    """Refused."""


class ContainerUploadBlock(Struct, tag="container_upload", tag_field="type"):
    """Refused."""


OtherBlock = ImageBlock | DocumentBlock | SearchResultBlock | ServerToolUseBlock | ContainerUploadBlock


class ToolResultBlock(Struct, tag="tool_result", tag_field="type"):
    """What a call gave."""

    tool_use_id: str
    content: str | list[TextBlock | OtherBlock] | None = None
    is_error: bool | None = None


AnyBlock = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | OtherBlock


class InputMessage(Struct):
    """A turn; blocks in any order."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class ToolBody(Struct):
    """A tool of the client's; only those of type "custom" are supported."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern="^[A-Za-z0-9_-]+$")]
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None
    input_examples: list[dict[str, Any]] | None = None


class ToolChoiceBody(Struct):
    """Whether tools are called; `name` belongs to type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """Whether the model thinks first. The budget is not enforced: thoughts count towards max_tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    """Text that keeps to a schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """How much effort, and which form; `xhigh` and `max` are `high` to chat templates."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(Struct):
    """An edit of the history."""

    type: str


class ContextManagement(Struct):
    """Edits of the history. `clear_thinking_20251015` is accepted: old thoughts are left to the chat template."""

    edits: list[ContextEdit] | None = None


class CountTokensBody(Struct, kw_only=True):
    """What the prompt is made of."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    container: Any | UnsetType = UNSET
    mcp_servers: list[Any] | UnsetType | None = UNSET


class MessagesBody(CountTokensBody, kw_only=True):
    """A request for an answer. Temperatures above 1 are accepted, up to 2."""

    max_tokens: Annotated[int, Meta(ge=0)]
    stream: bool | None = None
    stop_sequences: list[Annotated[str, Meta(min_length=1)]] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None


class Usage(Struct):
    """Tokens; the prompt is input_tokens and cache_read_input_tokens together."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class MessageAnswer(Struct, kw_only=True):
    """An answer; `timings` are this server's own, and come with the last."""

    id: str
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    timings: Timings | UnsetType = UNSET


class TokenCount(Struct):
    """Tokens of a prompt."""

    input_tokens: int
