"""Text from models and files on its way to a terminal: what would steer the terminal is taken out.

A model, a file's metadata or a tensor's name may hold escape sequences that move the cursor, change the title or worse.
"""

from __future__ import annotations

import sys
import unicodedata

__all__ = ["printable", "stream"]

_KEPT = frozenset("\n\t")


def printable(text: str) -> str:
    """`text` without control characters (Unicode category Cc), apart from line feeds and tabs."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) != "Cc")


def stream(text: str) -> None:
    """Print a piece of an answer at once; through a pipe it goes as it is."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
