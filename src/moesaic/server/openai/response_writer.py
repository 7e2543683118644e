"""Events of an answer as a response: its items, and the typed events of a stream that tell how they come about.

It knows no HTTP.
"""

from __future__ import annotations

import time
from typing import Any

from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.errors import ApiError
from moesaic.server.openai.answers import completed, new_id
from moesaic.server.openai.logprobs import ChatLogprob, chat_logprobs
from moesaic.server.openai.response_types import (
    CallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from moesaic.server.openai.usage import make_usage
from moesaic.server.sse import event
from moesaic.server.timings import make_timings

__all__ = ["ResponseWriter"]


class ResponseWriter:
    """Makes one response.

    Args:
        response: as it begins, without output; complete after the last event.

    Attributes:
        response: so far; the text of the item that is under way is missing.
        thoughts: pieces of them so far.
        reasoning_tokens: how many tokens these are; whoever knows sets it before the last event.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self.thoughts: list[str] = []
        self.reasoning_tokens = 0
        self._sequence = 0
        self._begun = False
        self._item: OutputItem | None = None  # under way
        self._call: int | None = None  # its number, of a call
        self._pieces: list[str] = []  # of its text
        self._logprobs: list[ChatLogprob] = []

    def begin(self) -> bytes:
        """The first events."""
        self._begun = True
        return self._emit("response.created", response=self.response) + self._emit(
            "response.in_progress", response=self.response
        )

    def add(self, each: Event) -> bytes:
        """What the next event of the answer means; b"" for nothing.

        Raises:
            ApiError: generation was given up.
        """
        match each:
            case TextDelta():
                return self._text(each) if each.text or each.logprobs else b""
            case ReasoningDelta():
                return self._thought(each) if each.text else b""
            case ToolCallDelta():
                return self._called(each)
            case Finished():
                return self._finish(each)

    def fail(self, error: ApiError) -> bytes:
        """The last event of a response that ends with an error."""
        before = b"" if self._begun else self.begin()
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response.status = "failed"
        self.response.error = ResponseError(code, error.message)
        return before + self._close("incomplete") + self._emit("response.failed", response=self.response)

    def _text(self, each: TextDelta) -> bytes:
        out = b""
        if not isinstance(self._item, MessageItem):
            out = self._open(MessageItem(id=new_id("msg_")))
            out += self._emit("response.content_part.added", **self._part, part=OutputText())
        logprobs = chat_logprobs(each.logprobs)
        self._pieces.append(each.text)
        self._logprobs += logprobs
        return out + self._emit("response.output_text.delta", **self._part, delta=each.text, logprobs=logprobs)

    def _thought(self, each: ReasoningDelta) -> bytes:
        out = b""
        if not isinstance(self._item, ReasoningItem):
            out = self._open(ReasoningItem(id=new_id("rs_")))
            out += self._emit("response.content_part.added", **self._part, part=ReasoningText())
        self._pieces.append(each.text)
        self.thoughts.append(each.text)
        return out + self._emit("response.reasoning_text.delta", **self._part, delta=each.text)

    def _called(self, each: ToolCallDelta) -> bytes:
        out = b""
        if not isinstance(self._item, CallItem) or self._call != each.call:
            out = self._open(CallItem(id=new_id("fc_"), call_id=each.id or new_id("call_"), name=each.name or ""))
            self._call = each.call
        if not each.arguments:
            return out
        self._pieces.append(each.arguments)
        return out + self._emit("response.function_call_arguments.delta", **self._place, delta=each.arguments)

    def _finish(self, each: Finished) -> bytes:
        """The end of the last item and of the response."""
        cut = completed(each.reason) == "length"
        out = b"" if self.response.output else self._text(TextDelta(0, ""))
        out += self._close("incomplete" if cut else "completed")
        usage = make_usage([[each.stats]], self.reasoning_tokens)
        self.response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(usage.completion_tokens_details.reasoning_tokens),
            usage.total_tokens,
        )
        self.response.timings = make_timings([[each.stats]])
        if cut:
            self.response.status = "incomplete"
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
            return out + self._emit("response.incomplete", response=self.response)
        self.response.status = "completed"
        self.response.completed_at = int(time.time())
        return out + self._emit("response.completed", response=self.response)

    def _open(self, item: OutputItem) -> bytes:
        """Begin an item; the one before is complete."""
        out = self._close("completed")
        self._item, self._call = item, None
        self.response.output = [*self.response.output, item]
        return out + self._emit("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _close(self, status: Any) -> bytes:
        """End the item under way, if there is one."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return b""
        match item:
            case MessageItem():
                part = OutputText(text=text, logprobs=self._logprobs)
                out = self._emit("response.output_text.done", **self._part, text=text, logprobs=self._logprobs)
                out += self._emit("response.content_part.done", **self._part, part=part)
                item.content = [part]
            case ReasoningItem():
                thought = ReasoningText(text=text)
                out = self._emit("response.reasoning_text.done", **self._part, text=text)
                out += self._emit("response.content_part.done", **self._part, part=thought)
                item.content = [thought]
            case CallItem():
                out = self._emit("response.function_call_arguments.done", **self._place, name=item.name, arguments=text)
                item.arguments = text
        item.status = status
        out += self._emit("response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        self._item, self._pieces, self._logprobs = None, [], []
        return out

    @property
    def _place(self) -> dict[str, Any]:
        """Which item is under way."""
        assert self._item is not None
        return {"item_id": self._item.id, "output_index": len(self.response.output) - 1}

    @property
    def _part(self) -> dict[str, Any]:
        """Which part of it: there is only one."""
        return {**self._place, "content_index": 0}

    def _emit(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(data, kind)
