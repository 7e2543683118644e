"""Turns of Anthropic's messages as turns of a conversation: blocks become text, thoughts, calls and their results.

Turns of the same role in a row are one turn. It knows nothing of the rest of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moesaic.server.anthropic.schema import (
    AnyBlock,
    InputMessage,
    OtherBlock,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from moesaic.server.conversation import Message, ToolCall
from moesaic.server.errors import ApiError

__all__ = ["input_messages"]

FAILED = "Error: "
"""Before what a failed call gave: conversations have no other place for `is_error`."""

_SEPARATOR = "\n"  # between blocks of text; an assistant's are as it wrote them, one after the other


@dataclass
class _Turns:
    """Turns so far, and names of the calls in them."""

    messages: list[Message] = field(default_factory=list)
    calls: dict[str, str] = field(default_factory=dict)

    def text(self, role: str, text: str) -> None:
        """Add a system's or user's text."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == role:
            text = f"{last.content}{_SEPARATOR}{text}"
            self.messages.pop()
        self.messages.append(Message("system" if role == "system" else "user", text))

    def assistant(self, text: str, reasoning: str, calls: Sequence[ToolCall]) -> None:
        """Add an assistant's turn."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "assistant":
            text, reasoning = last.content + text, (last.reasoning or "") + reasoning
            calls = (*last.tool_calls, *calls)
            self.messages.pop()
        self.messages.append(Message("assistant", text, reasoning or None, tuple(calls)))


def input_messages(system: str | list[TextBlock] | None, messages: Sequence[InputMessage]) -> tuple[Message, ...]:
    """All turns.

    Raises:
        ApiError: 400 if nobody but the system speaks, a block is not supported or in the wrong place, or a result
            belongs to no call.
    """
    turns = _Turns()
    if system:
        turns.text("system", system if isinstance(system, str) else _SEPARATOR.join(each.text for each in system))
    for index, message in enumerate(messages):
        where = f"messages[{index}].content"
        if isinstance(message.content, str):
            blocks: list[AnyBlock] = [TextBlock(message.content)]
        else:
            blocks = message.content
        if message.role == "assistant":
            _assistant(turns, blocks, where)
        else:
            _others(turns, message.role, blocks, where)
    if all(each.role == "system" for each in turns.messages):
        raise ApiError(400, "messages: expected at least one of a user.", param="messages")
    if turns.messages[-1].tool_calls:
        raise ApiError(400, "messages: the last one calls tools, but has no results.", param="messages")
    return tuple(turns.messages)


def _assistant(turns: _Turns, blocks: Sequence[AnyBlock], where: str) -> None:
    text, reasoning, calls = "", "", []
    for index, block in enumerate(blocks):
        match block:
            case TextBlock():
                text += block.text
            case ThinkingBlock():
                reasoning += block.thinking
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                if block.id in turns.calls:
                    raise ApiError(400, f"{where}[{index}].id: there are two calls with this id.", param=where)
                turns.calls[block.id] = block.name
                calls.append(ToolCall(block.id, block.name, msgspec.json.encode(block.input).decode()))
            case _:
                raise _misplaced(block, "assistant", f"{where}[{index}]")
    turns.assistant(text, reasoning, calls)


def _others(turns: _Turns, role: str, blocks: Sequence[AnyBlock], where: str) -> None:
    texts: list[str] = []
    for index, block in enumerate(blocks):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock() if role == "user":
                if texts:
                    turns.text(role, _SEPARATOR.join(texts))
                    texts = []
                turns.messages.append(_result(turns, block, f"{where}[{index}]"))
            case _:
                raise _misplaced(block, role, f"{where}[{index}]")
    if texts or not blocks:
        turns.text(role, _SEPARATOR.join(texts))


def _result(turns: _Turns, block: ToolResultBlock, where: str) -> Message:
    name = turns.calls.get(block.tool_use_id)
    if name is None:
        raise ApiError(
            400, f"{where}.tool_use_id: no call before it has the id '{block.tool_use_id[:100]}'.", param=where
        )
    if block.content is None or isinstance(block.content, str):
        text = block.content or ""
    else:
        for index, part in enumerate(block.content):
            if not isinstance(part, TextBlock):
                raise _misplaced(part, "tool_result", f"{where}.content[{index}]")
        text = _SEPARATOR.join(part.text for part in block.content if isinstance(part, TextBlock))
    return Message("tool", FAILED + text if block.is_error else text, tool_call_id=block.tool_use_id, name=name)


def _misplaced(block: AnyBlock, role: str, where: str) -> ApiError:
    kind = block.__struct_config__.tag
    if isinstance(block, OtherBlock):
        message = f"{where}: blocks of type '{kind}' are not supported by this server."
        return ApiError(400, message, param=where, code="unsupported")
    return ApiError(400, f"{where}: a block of type '{kind}' does not belong to '{role}'.", param=where)
