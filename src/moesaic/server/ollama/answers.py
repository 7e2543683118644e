"""Answers in Ollama's form: pieces of a stream, and the whole of them.

It knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from moesaic.engine.serving.outputs import Chunk, RequestStats, TokenLogprob
from moesaic.server.arguments import arguments_object
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.errors import ApiError
from moesaic.server.ollama.schema import (
    ChatAnswer,
    FunctionCall,
    GenerateAnswer,
    Logprob,
    TokenProbability,
    ToolCallBody,
)
from moesaic.server.streams import closing
from moesaic.server.timings import make_timings

__all__ = ["Last", "Piece", "chunk_pieces", "event_pieces", "finish", "joined", "now"]


@dataclass(slots=True)
class Last:
    """How an answer ended.

    Attributes:
        reason: why.
        stats: counts and times of it.
        nanoseconds: since it was asked for.
    """

    reason: Literal["stop", "length"]
    stats: RequestStats
    nanoseconds: int


@dataclass(slots=True)
class Piece:
    """New text, thoughts, calls and logprobs of an answer, or of all of it."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCallBody] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    last: Last | None = None


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def event_pieces(events: AsyncIterator[Event]) -> AsyncGenerator[Piece, None]:
    """Pieces of a conversation's answer; a call is one when it is complete.

    Raises:
        ApiError: the answer was not completed.
    """
    began = time.perf_counter_ns()
    call: ToolCallDelta | None = None  # that is not complete
    arguments: list[str] = []
    made = 0
    async with closing(events):
        async for event in events:
            if call is not None and not (isinstance(event, ToolCallDelta) and event.call == call.call):
                yield Piece(calls=[_call(call, arguments, made)])
                call, arguments, made = None, [], made + 1
            match event:
                case TextDelta():
                    if event.text or event.logprobs:
                        yield Piece(event.text, logprobs=_logprobs(event.logprobs))
                case ReasoningDelta():
                    if event.text or event.logprobs:
                        yield Piece(thinking=event.text, logprobs=_logprobs(event.logprobs))
                case ToolCallDelta():
                    call = call or event
                    arguments.append(event.arguments)
                case Finished():
                    yield Piece(last=_last(event.reason, event.stats, began))


async def chunk_pieces(chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Piece, None]:
    """Pieces of a text that goes on; see `event_pieces`."""
    began = time.perf_counter_ns()
    async with closing(chunks):
        async for chunk in chunks:
            if chunk.text or chunk.logprobs:
                yield Piece(chunk.text, logprobs=_logprobs(chunk.logprobs))
            if chunk.finish_reason is not None:
                yield Piece(last=_last(chunk.finish_reason, chunk.stats or RequestStats(), began))


async def joined(pieces: AsyncIterator[Piece]) -> Piece:
    """All pieces as one."""
    texts, thoughts, whole = [], [], Piece()
    async for piece in pieces:
        texts.append(piece.text)
        thoughts.append(piece.thinking)
        whole.calls.extend(piece.calls)
        whole.logprobs.extend(piece.logprobs)
        whole.last = piece.last or whole.last
    whole.text, whole.thinking = "".join(texts), "".join(thoughts)
    return whole


def finish(answer: ChatAnswer | GenerateAnswer, last: Last | None) -> None:
    """Make an object the last one, if the answer has ended."""
    if last is None:
        return
    stats = last.stats
    answer.done, answer.done_reason = True, last.reason
    answer.total_duration = last.nanoseconds
    answer.load_duration = _ns(stats.queue_seconds)
    answer.prompt_eval_count, answer.prompt_eval_duration = stats.prompt_tokens, _ns(stats.prefill_seconds)
    answer.eval_count, answer.eval_duration = stats.generated_tokens, _ns(stats.decode_seconds)
    answer.timings = make_timings([[stats]])


def _call(call: ToolCallDelta, arguments: Iterable[str], index: int) -> ToolCallBody:
    values: dict[str, Any] = arguments_object("".join(arguments))
    return ToolCallBody(id=call.id, function=FunctionCall(name=call.name or "", arguments=values, index=index))


def _last(reason: str, stats: RequestStats, began: int) -> Last:
    if reason == "cancelled":
        raise ApiError(503, "the answer was cancelled by the server.", "api_error")
    if reason == "error":
        raise ApiError(500, "the answer could not be completed.", "api_error")
    return Last("length" if reason == "length" else "stop", stats, time.perf_counter_ns() - began)


def _ns(seconds: float) -> int:
    return max(round(seconds * 1e9), 1)  # clients divide by it


def _logprobs(tokens: Iterable[TokenLogprob]) -> list[Logprob]:
    return [
        Logprob(
            token=_text(each.raw),
            logprob=_finite(each.logprob),
            bytes=list(each.raw),
            top_logprobs=[
                TokenProbability(token=_text(other.raw), logprob=_finite(other.logprob), bytes=list(other.raw))
                for other in each.top
            ],
        )
        for each in tokens
    ]


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
