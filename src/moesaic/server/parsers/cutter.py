"""What parsers have in common that cut text which comes bit by bit: what is not settled yet, and the pieces that are.

It does not know where to cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from moesaic.server.parsers.base import MarkerPiece, Piece

__all__ = ["Cutter"]


class Cutter(ABC):
    """Text goes into a buffer; steps take pieces from its beginning as long as anything changes."""

    def __init__(self) -> None:
        self._buffer = ""
        self._end = 0  # characters that have left the buffer
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """Take more of the answer."""
        self._buffer += text
        while self._step():
            pass
        return self._take()

    @abstractmethod
    def _step(self) -> bool:
        """Deal with the next part of the buffer; whether anything changed."""

    def _leave(self, size: int) -> str:
        """The first characters of the buffer, which leave it."""
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        self._end += size
        return text

    def _skip(self, size: int) -> None:
        """Characters that are no text leave the buffer."""
        if size > 0:
            self._leave(size)
            self._pieces.append(MarkerPiece(self._end))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces
