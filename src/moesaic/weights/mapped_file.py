"""A model file mapped into memory, read-only: bounded views of its bytes, and giving their pages back.

It does not know what the bytes mean. A file that another process shortens while it is mapped cannot be guarded
against: the kernel raises SIGBUS for such a read.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from moesaic.errors import CheckpointError

__all__ = ["MappedFile"]


class MappedFile:
    """The bytes of one regular file.

    Args:
        path: the file; anything but a regular, non-empty file is refused (a pipe would block for ever).

    Raises:
        CheckpointError: the file cannot be opened, is not a regular file or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(path, "is not a regular file: expected a model file.")
            if status.st_size == 0:
                raise CheckpointError(path, "is empty: expected a model file; download it again.")
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(path, f"cannot be opened: {error.strerror or error}.") from error
        self._bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self.size = len(self._map)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """The bytes `[offset, offset + nbytes)` as a read-only uint8 array without a copy.

        Callers have checked the range against `size`; a view keeps the mapping alive after `close`.
        """
        if self._bytes is None:
            raise CheckpointError(self.path, "was closed: its tensors can no longer be read.")
        assert min(offset, nbytes) >= 0 and offset + nbytes <= self.size
        return self._bytes[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Tell the kernel that the whole pages inside the range need not stay resident; a later read faults them in."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._bytes is not None and last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Drop the mapping; the memory is returned as soon as no view of it is left."""
        self._bytes = None

    def __repr__(self) -> str:
        return f"MappedFile({os.fspath(self.path)!r}, {self.size} bytes)"
