"""One answer on its way to the client: pieces of text in, events out, log-probabilities with the text they are of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from moesaic.engine.serving.outputs import Chunk, RequestStats, TokenLogprob
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.parsers.base import (
    Call,
    CallPiece,
    MarkerPiece,
    Parser,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolStyle,
)

__all__ = ["Answer"]


@dataclass(slots=True)
class Answer:
    """The events of answer `choice`.

    Attributes:
        choice: which of a request's.
        parser: cuts its text.
        style: of its calls, which names those without an id.
        taken: ids of calls in the conversation so far.
        parallel: whether it may hold several calls; otherwise all after the first are left out.
    """

    choice: int
    parser: Parser
    style: ToolStyle | None = None
    taken: Set[str] = frozenset()
    parallel: bool = True
    _calls: list[str] = field(default_factory=list)
    _fed: int = 0
    _logprobs: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)

    def feed(self, chunk: Chunk) -> Iterator[Event]:
        """The events of the next piece; after the last one, `Finished`."""
        if chunk.logprobs:
            self._note(chunk)
        self._fed += len(chunk.text)
        yield from self._events(self.parser.feed(chunk.text))
        if chunk.finish_reason is None:
            return
        yield from self._events(self.parser.finish())
        reason = "tool_calls" if self._calls and chunk.finish_reason == "stop" else chunk.finish_reason
        stop = chunk.stop if isinstance(chunk.stop, str) else None
        yield Finished(self.choice, reason, chunk.stats or RequestStats(), stop)

    def _note(self, chunk: Chunk) -> None:
        """Remember where in the text each token ends; all at the piece's end if its bytes do not say."""
        sizes = [len(entry.raw.decode("utf-8", "ignore")) for entry in chunk.logprobs]
        exact = sum(sizes) == len(chunk.text)
        end = self._fed
        for size, entry in zip(sizes, chunk.logprobs, strict=True):
            end = end + size if exact else self._fed + len(chunk.text)
            self._logprobs.append((end, entry))

    def _events(self, pieces: list[Piece]) -> Iterator[Event]:
        for piece in pieces:
            logprobs = self._until(piece.end)
            match piece:
                case TextPiece(text):
                    yield TextDelta(self.choice, text, logprobs)
                case ReasoningPiece(text):
                    yield ReasoningDelta(self.choice, text, logprobs)
                case CallPiece(call) if self.parallel or not self._calls:
                    yield ToolCallDelta(self.choice, len(self._calls), call.arguments, self._id(call), call.name)
                    self._calls.append(call.name)
                case MarkerPiece() | CallPiece():
                    pass

    def _until(self, end: int) -> tuple[TokenLogprob, ...]:
        taken = []
        while self._logprobs and self._logprobs[0][0] <= end:
            taken.append(self._logprobs.popleft()[1])
        return tuple(taken)

    def _id(self, call: Call) -> str:
        assert self.style is not None
        identity, count = call.id, len(self.taken)
        while identity is None or identity in self.taken:
            identity, count = self.style.new_id(call.name, count), count + 1
        self.taken = self.taken | {identity}
        return identity
