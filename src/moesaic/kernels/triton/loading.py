"""Kernels that are compiled and loaded: how many were, and a word to whoever waits for the first of them.

Triton compiles a kernel when it is launched first and keeps it in a folder; a process loads it onto the card once.
Times in which that happened say nothing of what kernels take.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from triton import knobs

__all__ = ["expected", "kernel_folder", "num_loaded"]

_LOG = logging.getLogger("moesaic.gpu")
_loaded = 0
_told = False
_expected = threading.local()
_earlier = knobs.compilation.listener


def _count(*_: Any) -> None:
    global _loaded
    _loaded += 1


def _tell(*, cache_hit: bool, **what: Any) -> None:
    global _told
    if _earlier is not None:
        _earlier(cache_hit=cache_hit, **what)
    if not cache_hit and not _told and not getattr(_expected, "here", False):
        _told = True
        _LOG.warning(
            "compiling kernels for this GPU: the first answers on this computer may take minutes. It is done once; "
            "kernels are kept in %s",
            knobs.cache.dir,
        )


knobs.runtime.kernel_load_end_hook.add(_count)
knobs.compilation.listener = _tell


def num_loaded() -> int:
    """Kernels that were loaded since this process began."""
    return _loaded


def kernel_folder() -> str:
    """Where compiled kernels are kept for the next start."""
    return str(knobs.cache.dir)


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """Inside, nobody waits for what the calling thread compiles without having been told."""
    _expected.here = True
    try:
        yield
    finally:
        _expected.here = False
