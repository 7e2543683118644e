"""Triton's interpreter, quicker: it asks for all members of its modules at every call of a function on the device.

Which of them it replaces never changes, so their names are looked up once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any


class RememberedMembers:
    """The module `inspect` for the interpreter: `getmembers` gives only the members that it replaces."""

    def __init__(self, is_replaced: Callable[[object], bool]) -> None:
        self._is_replaced = is_replaced
        self._names: dict[object, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmembers(self, of: object) -> list[tuple[str, Any]]:
        """As they are now; the first call finds the names, before anything was replaced."""
        names = self._names.get(of)
        if names is None:
            names = [name for name, member in inspect.getmembers(of) if self._is_replaced(member)]
            self._names[of] = names
        return [(name, getattr(of, name)) for name in names]


def remember_members() -> None:
    """For the rest of the process, if it has the interpreter."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None and interpreter.inspect is inspect:
        interpreter.inspect = RememberedMembers(interpreter.tl.core.is_builtin)
