"""How often a kernel was loaded onto the card, compiled or from Triton's cache: such times say nothing of kernels."""

from __future__ import annotations

from typing import Any

from triton import knobs

__all__ = ["num_loaded"]

_loaded = 0


def _count(*_: Any) -> None:
    global _loaded
    _loaded += 1


knobs.runtime.kernel_load_end_hook.add(_count)


def num_loaded() -> int:
    """Kernels that were loaded since this process began."""
    return _loaded
