"""How often Triton compiled or loaded a kernel: times in which it did say nothing of what the kernels take."""

from __future__ import annotations

from typing import Any

from triton import knobs

__all__ = ["num_compiled"]

_compiled = 0
_earlier_hook = knobs.runtime.jit_post_compile_hook


def _count(**what: Any) -> bool | None:
    global _compiled
    _compiled += 1
    return None if _earlier_hook is None else _earlier_hook(**what)


knobs.runtime.jit_post_compile_hook = _count


def num_compiled() -> int:
    """Kernels that were compiled, or read from Triton's cache of files, since this process began."""
    return _compiled
