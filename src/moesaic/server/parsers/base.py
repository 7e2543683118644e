"""What a style of reasoning or of tool calls says of itself, and the pieces that an answer is cut into.

It knows neither tokenizers nor engines: text comes in as it is made, pieces come out. A call is given out when it is
complete, because what turns out to be none must become text, and what is out cannot be taken back.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from moesaic.server.conversation import Tool

__all__ = [
    "Call",
    "CallPiece",
    "MarkerPiece",
    "Parser",
    "Piece",
    "ReasoningPiece",
    "ReasoningStyle",
    "Terminal",
    "TextPiece",
    "ToolStyle",
    "Verdict",
]

Verdict = Literal["incomplete", "malformed"]
"""Of text that begins like a call: more of it is needed, or no more of it can make it one."""

Terminal = Callable[[str], str]
"""What a Lark grammar calls a marker: a string, or the number of a special token."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a model wrote it: name, arguments as the JSON text of an object, and the id if the style has one."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer; `end`: how many characters of what was fed are dealt with now."""

    text: str
    end: int


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """More of the thoughts; `end` as in `TextPiece`."""

    text: str
    end: int


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A whole call; `end` as in `TextPiece`."""

    call: Call
    end: int


@dataclass(frozen=True, slots=True)
class MarkerPiece:
    """Nothing to see: markers and the blanks around them; `end` as in `TextPiece`."""

    end: int


Piece = TextPiece | ReasoningPiece | CallPiece | MarkerPiece


class Parser(Protocol):
    """Cuts one answer into pieces. It never raises for what a model writes."""

    def feed(self, text: str) -> list[Piece]:
        """Take more of the answer; what could still be the beginning of a marker is held back."""
        ...

    def finish(self) -> list[Piece]:
        """The answer is over: what was held back."""
        ...


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """Thoughts between two markers, before the answer.

    Attributes:
        name: by which it is asked for.
        opener: before them; the generation prompt may hold it already.
        closer: after them.
        between: what has to follow the closer before anything else comes.
        answer: before an answer that is text.
    """

    name: str
    opener: str
    closer: str
    between: str = ""
    answer: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; where they are special tokens, the answer's text has to have them."""
        return tuple(text for text in (self.opener, self.closer, self.between, self.answer) if text)


class ToolStyle(ABC):
    """How a model writes calls.

    Attributes:
        name: by which it is asked for.
        openers: a block, which holds a call or several, begins with one of these.
        closers: it ends with one of these if `read` agrees; without any it ends with the answer.
        noise: further markers outside of blocks, which mean nothing by themselves.
        inner: further markers inside of blocks.
        only_at_start: whether an opener in the middle of an answer is text.
        describes_tools: whether `instructions` says how to call, for templates that do not.
        calls_first: whether calls come without any text before them.
        single_calls: whether the template takes one call per turn, so that turns with several are taken apart.
    """

    name: ClassVar[str]
    openers: ClassVar[tuple[str, ...]]
    closers: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[tuple[str, ...]] = ()
    inner: ClassVar[tuple[str, ...]] = ()
    only_at_start: ClassVar[bool] = False
    describes_tools: ClassVar[bool] = False
    calls_first: ClassVar[bool] = False
    single_calls: ClassVar[bool] = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; where they are special tokens, the answer's text has to have them."""
        return (*self.openers, *self.closers, *self.noise, *self.inner)

    @abstractmethod
    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """The calls in a block from its opener on; where the answer ended in it, the closer may be missing."""

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """Lark rules, one of them named `calls`, that force calls of some of these tools.

        Args:
            tools: that may be called.
            parallel: whether several calls may follow one another.
            terminal: says how markers are written.
            first: what the first opener (or marker before it) is written as.

        Returns:
            The rules, or None if this style has no grammar.
        """
        return None

    def start_of_calls(self) -> str:
        """The marker that comes first where calls begin."""
        return self.openers[0]

    def new_id(self, name: str, count: int) -> str:
        """An id for a call for which the model wrote none, or one that is taken; `count`: of calls before it."""
        return f"call_{secrets.token_hex(12)}"

    def instructions(self, tools: Sequence[Tool], rename: Callable[[str], str]) -> str:
        """What tells the model of tools where its template does not: a part of the system's text."""
        raise NotImplementedError(f"the style {self.name} leaves tools to the template")

    def adapt(self, turn: dict[str, Any]) -> None:
        """Change a turn that calls into what the style's templates expect, where that is something of their own."""
        return None

    def history_id(self, call_id: str) -> str:
        """How a call's id is written in the conversation for the model."""
        return call_id
