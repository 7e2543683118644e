"""Events of one conversation's answers, put together: what every form of a whole answer is made of.

It does not know which API asks.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from moesaic.engine.serving.outputs import RequestStats, TokenLogprob
from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Event, Finished, ReasoningDelta, TextDelta, ToolCall, ToolCallDelta
from moesaic.server.errors import ApiError
from moesaic.server.state import Chat
from moesaic.server.streams import closing

__all__ = ["FinishReason", "WholeAnswer", "completed", "events_of", "new_id", "reasoning_tokens"]

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class WholeAnswer:
    """One of `n`.

    Attributes:
        text: pieces of what it says.
        reasoning: pieces of what was thought before.
        text_logprobs: of the tokens of `text`.
        reasoning_logprobs: of the tokens of `reasoning`.
        calls: id, name and pieces of the arguments, in order.
        finished: the last event.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    text_logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Append the next event of this answer."""
        match event:
            case TextDelta():
                self.text.append(event.text)
                self.text_logprobs.extend(event.logprobs)
            case ReasoningDelta():
                self.reasoning.append(event.text)
                self.reasoning_logprobs.extend(event.logprobs)
            case ToolCallDelta():
                call = self.calls.setdefault(event.call, (event.id or "", event.name or "", []))
                call[2].append(event.arguments)
            case Finished():
                self.finished = event

    @property
    def stats(self) -> RequestStats:
        """Counts and times; of an answer that is not complete, none."""
        return RequestStats() if self.finished is None else self.finished.stats

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Complete calls."""
        return [ToolCall(identity, name, "".join(pieces)) for identity, name, pieces in self.calls.values()]


def completed(reason: str | None) -> FinishReason:
    """Why an answer is complete; None if nothing was said of that.

    Raises:
        ApiError: it is not, because generation was given up.
    """
    match reason:
        case "stop" | "length" | "tool_calls":
            return reason
        case "cancelled":
            raise ApiError(503, "the server has cancelled this request.", "api_error", code="cancelled")
    raise ApiError(500, "the answer could not be completed.", "api_error")


async def reasoning_tokens(chat: Chat, pieces: list[str]) -> int:
    """Number of tokens of thoughts, by encoding them anew: events do not carry it.

    Thoughts that cannot be encoded as text (they spell out a special token) count a token per piece.
    """
    if not pieces:
        return 0
    try:
        return len(await asyncio.to_thread(chat.encode, "".join(pieces), add_special_tokens=False))
    except RequestError:
        return len(pieces)


@asynccontextmanager
async def events_of(
    chat: Chat, request: ChatRequest, identity: str, names: Mapping[str, str]
) -> AsyncGenerator[AsyncIterator[Event], None]:
    """The events of a conversation's answers; leaving cancels.

    Args:
        chat: answers.
        request: what is asked.
        identity: of the request.
        names: what the API calls parameters that have another name in `ChatRequest`, for errors.
    """
    try:
        async with closing(chat.chat(request, identity)) as events:
            yield events
    except RequestError as error:
        error.param = names.get(error.param or "", error.param)
        raise


def new_id(prefix: str) -> str:
    """A number that nobody has."""
    return f"{prefix}{secrets.token_hex(12)}"
