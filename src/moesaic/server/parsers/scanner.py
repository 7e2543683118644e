"""Cuts an answer with markers into pieces: thoughts first, then text, in which blocks of calls stand.

The sum of the pieces does not depend on how the answer was cut when it was fed. It does not know what any block means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import (
    CallPiece,
    Piece,
    ReasoningPiece,
    ReasoningStyle,
    TextPiece,
    ToolStyle,
)
from moesaic.server.parsers.cutter import Cutter
from moesaic.server.parsers.markers import Markers

__all__ = ["Scanner"]


class Scanner(Cutter):
    """A parser for every style that marks what it writes.

    Args:
        reasoning: how thoughts are marked; None if there are none.
        opened: whether the prompt has begun the thoughts already.
        style: how calls are marked; None if no tools are offered.
        tools: those offered, by name.
        drop: special tokens that are no markers: they are taken out wherever they stand.
        interrupts: markers that end thoughts which were not ended: those of calls that no text can contain.
    """

    def __init__(
        self,
        reasoning: ReasoningStyle | None = None,
        opened: bool = False,
        style: ToolStyle | None = None,
        tools: Mapping[str, Tool] | None = None,
        drop: Iterable[str] = (),
        interrupts: Iterable[str] = (),
    ) -> None:
        super().__init__()
        drop, interrupts = tuple(drop), tuple(interrupts)
        self._reasoning = reasoning
        self._style = style
        self._tools = dict(tools or {})
        self._openers = frozenset(style.openers) if style is not None else frozenset()
        self._drop, self._drop_texts = Markers(drop), frozenset(drop)
        noise = style.noise if style is not None else ()
        openers = () if style is None or style.only_at_start else style.openers
        self._in_text = Markers((*openers, *noise, *drop))
        self._in_reasoning = Markers((reasoning.closer if reasoning else "", *interrupts, *drop))
        self._in_block = Markers(style.closers if style is not None else ())
        self._state: Literal["start", "reasoning", "text", "block"] = "start"
        if opened:
            self._state = "reasoning"
        self._blank = True  # nothing of this part was given out yet
        self._trim = opened  # blanks at this part's beginning are dropped
        self._scanned = 0  # so much of a block has no closer, or none that counts
        self._before = ""  # blanks in front of a block, which belong to the text if it is none
        self._called = False

    def finish(self) -> list[Piece]:
        """The answer is over."""
        if self._state == "start":
            self._state = "text"
        while self._step() or self._state == "block":
            if self._state == "block":
                self._close_block(len(self._buffer), final=True)
        whole = self._state == "text" and not self._called
        self._give(len(self._buffer) if whole else len(self._buffer.rstrip()))
        self._skip(len(self._buffer))
        return self._take()

    def _step(self) -> bool:
        """Deal with the next part of the buffer; whether anything changed."""
        match self._state:
            case "start":
                return self._start()
            case "reasoning":
                return self._think()
            case "text":
                return self._speak()
            case "block":
                return self._collect()

    def _start(self) -> bool:
        style = self._reasoning
        stripped = self._buffer.lstrip()
        blanks = len(self._buffer) - len(stripped)
        if style is None or not (style.opener.startswith(stripped) or style.closer.startswith(stripped)):
            self._state = "text"
            if style is not None and stripped.startswith((style.opener, style.closer)):
                thinks = stripped.startswith(style.opener)
                self._skip(blanks + len(style.opener if thinks else style.closer))
                self._begin("reasoning" if thinks else "text")
            return True
        if stripped in (style.opener, style.closer):
            self._skip(len(self._buffer))
            self._begin("reasoning" if stripped == style.opener else "text")
            return True
        return False

    def _think(self) -> bool:
        assert self._reasoning is not None
        found = self._in_reasoning.first(self._buffer)
        if found is None:
            return self._give(len(self._buffer[: self._settled(self._in_reasoning)].rstrip()))
        if found[0] in self._drop_texts:
            self._give(found.start())
            self._skip(len(found[0]))
            return True
        size = found.end() if found[0] == self._reasoning.closer else found.start()
        given = len(self._buffer[: found.start()].rstrip())
        self._give(given)
        self._skip(size - given)
        self._begin("text")
        return True

    def _speak(self) -> bool:
        if self._style is not None and self._style.only_at_start and self._blank and not self._called:
            stripped = self._buffer.lstrip()
            if stripped.startswith(self._style.openers):
                self._open_block(len(self._buffer) - len(stripped))
                return True
            if any(opener.startswith(stripped) for opener in self._style.openers):
                return False
        found = self._in_text.first(self._buffer)
        if found is None:
            settled = self._settled(self._in_text)
            return self._give(settled if self._style is None else len(self._buffer[:settled].rstrip()))
        if found[0] in self._drop_texts:
            self._give(found.start())
            self._skip(len(found[0]))
            return True
        given = len(self._buffer[: found.start()].rstrip())
        self._give(given)
        if found[0] in self._openers:
            self._open_block(found.start() - given)
        else:
            self._skip(found.end() - given)
        return True

    def _open_block(self, blanks: int) -> None:
        self._before = self._buffer[:blanks]
        self._skip(blanks)
        self._state, self._scanned = "block", 0

    def _collect(self) -> bool:
        found = self._in_block.first(self._buffer, self._scanned)
        if found is None:
            self._scanned = max(self._scanned, self._settled(self._in_block))
            return False
        self._close_block(found.end(), final=False)
        return True

    def _close_block(self, size: int, final: bool) -> None:
        assert self._style is not None
        calls = self._style.read(self._drop.without(self._buffer[:size]), self._tools)
        if isinstance(calls, list) and calls:
            self._skip(size)
            self._pieces += [CallPiece(call, self._end) for call in calls]
            self._called, self._state = True, "text"
        elif calls == "incomplete" and not final:
            self._scanned = size
        else:  # no call: its opener is text, and the rest of it is looked at again
            opener = next(text for text in self._style.openers if self._buffer.startswith(text))
            self._state = "text"
            self._give(len(opener), self._before)

    def _settled(self, markers: Markers) -> int:
        return len(self._buffer) - markers.held(self._buffer)

    def _begin(self, state: Literal["reasoning", "text"]) -> None:
        self._state, self._blank, self._trim = state, True, True

    def _give(self, size: int, before: str = "") -> bool:
        """Give out the first characters of the buffer as what they are; whether there were any."""
        if self._blank and self._trim:
            text = self._buffer[:size]
            blanks = len(text) - len(text.lstrip())
            self._skip(blanks)
            size, before = size - blanks, ""
        if size <= 0:
            return False
        text = self._leave(size)
        self._blank = False
        self._pieces.append((ReasoningPiece if self._state == "reasoning" else TextPiece)(before + text, self._end))
        return True
