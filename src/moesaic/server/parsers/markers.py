"""Finds any of many texts quickly: markers, and special tokens of which a vocabulary may have a thousand."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["Markers", "find_any"]


def find_any(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, the longest first; common beginnings are looked at only once."""
    return _pattern(tuple(sorted({text for text in texts if text})))


@functools.lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_expression(tree) if texts else "(?!)")


def _expression(node: dict[str, Any]) -> str:
    written = ""
    while len(node) == 1 and "" not in node:  # a chain, however long, is no recursion
        ((character, node),) = node.items()
        written += re.escape(character)
    branches = [re.escape(character) + _expression(child) for character, child in node.items() if character]
    if not branches:
        return written
    return f"{written}(?:{'|'.join(branches)}){'?' if '' in node else ''}"


class Markers:
    """Finds the first of some markers, and how much of a text's end may be the beginning of one."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._pattern = find_any(markers := tuple(markers))
        self._beginnings, self._longest = _beginnings(tuple(sorted({text for text in markers if text})))

    def first(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The first marker from `start` on, the longest of those at the same place."""
        return self._pattern.search(text, start)

    def held(self, text: str) -> int:
        """How many characters at the end of the text have to wait for what comes next."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                return size
        return 0

    def without(self, text: str) -> str:
        """The text with the markers taken out."""
        return self._pattern.sub("", text)


@functools.lru_cache(maxsize=64)
def _beginnings(texts: tuple[str, ...]) -> tuple[frozenset[str], int]:
    beginnings = frozenset(text[:size] for text in texts for size in range(1, len(text)))
    return beginnings, max(map(len, texts), default=0)
