"""Text on its way to and from a terminal: what would steer the terminal is taken out, what is no UTF-8 is refused.

A model, a file's metadata or a tensor's name may hold escape sequences that move the cursor, change the title or worse.
"""

from __future__ import annotations

import io
import os
import sys
import unicodedata

from moesaic.errors import ConfigError

__all__ = ["abandon_output", "given_text", "prepare_streams", "printable", "stream"]

_KEPT = frozenset("\n\t")


def printable(text: str) -> str:
    """`text` without control characters (Unicode category Cc), apart from line feeds and tabs."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) != "Cc")


def stream(text: str) -> None:
    """Print a piece of an answer at once; through a pipe it goes as it is."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def prepare_streams() -> None:
    """Make standard streams that any text can be printed to, whatever the locale and whoever started the program."""
    for name in ("stdin", "stdout", "stderr"):
        found = getattr(sys, name)
        if found is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name == "stdout" and isinstance(found, io.TextIOWrapper):
            found.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Let nothing more come to standard output: what is left in its buffer would fail again when the program ends."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file behind it, or closed already
        return


def given_text(text: str, where: str) -> str:
    """Text that came from the command line or a pipe, as the UTF-8 that its bytes are.

    Args:
        text: as Python decoded it; bytes that are nothing in the locale's encoding are lone surrogates in it.
        where: what it was given as, for the message.

    Raises:
        ConfigError: the bytes are no UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"{where} is not UTF-8 text ({error.reason} at position {error.start}): convert it, for example with iconv."
        ) from None
