"""An answer as blocks of Anthropic's messages: whole, and as the events that tell how they grow.

It knows no HTTP.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

from moesaic.engine.serving.outputs import RequestStats
from moesaic.server.anthropic.schema import MessageAnswer, TextBlock, ThinkingBlock, ToolUseBlock, Usage
from moesaic.server.arguments import arguments_object
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.errors import ApiError
from moesaic.server.timings import make_timings

__all__ = ["MessageBuilder"]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
JsonEvent = dict[str, Any]
_Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageBuilder:
    """Makes a message of the events of an answer.

    Args:
        message_id: of the message.
        model: name of the model.
        max_tokens: of the request: an answer that ends before them ended because the context was full.
        show_thinking: whether thoughts are told; if not, there is a block without text where they were.

    Attributes:
        message: so far; complete after `Finished`.
    """

    def __init__(self, message_id: str, model: str, max_tokens: int, show_thinking: bool = True) -> None:
        self.message = MessageAnswer(id=message_id, model=model, content=[], usage=Usage())
        self._max_tokens = max_tokens
        self._show_thinking = show_thinking
        self._block: _Block | None = None  # that grows
        self._pieces: list[str] = []  # of it
        self._call = -1  # that it is, if it is one

    def start(self, prompt_tokens: int) -> Iterator[JsonEvent]:
        """The first events of a stream."""
        self.message.usage.input_tokens = prompt_tokens
        yield {"type": "message_start", "message": self.message}
        yield {"type": "ping"}

    def add(self, event: Event) -> Iterator[JsonEvent]:
        """Take an event of the answer, and tell what it means to a stream. It must be iterated to the end.

        Raises:
            ApiError: the answer was not completed.
        """
        match event:
            case ReasoningDelta() if event.text:
                if not isinstance(self._block, ThinkingBlock):
                    yield from self._begin(ThinkingBlock(""))
                yield from self._grow(event.text)
            case TextDelta() if event.text:
                if not isinstance(self._block, TextBlock):
                    yield from self._begin(TextBlock(""))
                yield from self._grow(event.text)
            case ToolCallDelta():
                if not isinstance(self._block, ToolUseBlock) or event.call != self._call:
                    call_id = event.id or f"{self.message.id}_{event.call}"
                    yield from self._begin(ToolUseBlock(call_id, event.name or "", {}))
                    self._call = event.call
                if event.arguments:
                    yield from self._grow(event.arguments)
            case Finished():
                yield from self._finish(event)

    def _begin(self, block: _Block) -> Iterator[JsonEvent]:
        yield from self._close()
        self._block = block
        yield {"type": "content_block_start", "index": len(self.message.content), "content_block": block}

    def _grow(self, text: str) -> Iterator[JsonEvent]:
        self._pieces.append(text)
        match self._block:
            case TextBlock():
                yield self._delta({"type": "text_delta", "text": text})
            case ToolUseBlock():
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case ThinkingBlock() if self._show_thinking:
                yield self._delta({"type": "thinking_delta", "thinking": text})

    def _delta(self, delta: JsonEvent) -> JsonEvent:
        return {"type": "content_block_delta", "index": len(self.message.content), "delta": delta}

    def _close(self) -> Iterator[JsonEvent]:
        text = "".join(self._pieces)
        match self._block:
            case None:
                return
            case TextBlock() as block:
                block.text = text
            case ToolUseBlock() as block:
                block.input = arguments_object(text)
            case ThinkingBlock() as block:
                block.thinking, block.signature = text if self._show_thinking else "", _signature(text)
                yield self._delta({"type": "signature_delta", "signature": block.signature})
        yield {"type": "content_block_stop", "index": len(self.message.content)}
        self.message.content.append(self._block)
        self._block, self._pieces = None, []

    def _finish(self, event: Finished) -> Iterator[JsonEvent]:
        yield from self._close()
        if event.reason == "cancelled":
            raise ApiError(503, "the answer was cancelled by the server.", "api_error")
        if event.reason == "error":
            raise ApiError(500, "the answer could not be completed.", "api_error")
        message = self.message
        message.usage, message.timings = _usage(event.stats), make_timings([[event.stats]])
        message.stop_reason = _REASONS[event.reason]
        if event.reason == "stop" and event.stop is not None:
            message.stop_reason, message.stop_sequence = "stop_sequence", event.stop
        elif event.reason == "length" and event.stats.generated_tokens < self._max_tokens:
            message.stop_reason = "model_context_window_exceeded"
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": message.usage, "timings": message.timings}
        yield {"type": "message_stop"}


def _usage(stats: RequestStats) -> Usage:
    fresh = stats.prompt_tokens - stats.cached_tokens
    return Usage(fresh, stats.generated_tokens, cache_read_input_tokens=stats.cached_tokens)


def _signature(thoughts: str) -> str:
    digest = hashlib.blake2b(thoughts.encode("utf-8", "surrogatepass"), digest_size=48).digest()
    return base64.b64encode(digest).decode()
