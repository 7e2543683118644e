"""Files that people keep: written whole or not at all. It knows nothing of what is in them."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8; a failure (a full disk, a crash) leaves what was there before.

    It is written beside its place and put there when it is on the disk. A link stays one, and a file keeps its mode. Of
    devices and pipes nothing is kept: they are written to as they are.

    Args:
        path: of the file, in a folder that exists.
        text: all of its content.

    Raises:
        OSError: it cannot be written.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
