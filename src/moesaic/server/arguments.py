"""Arguments of calls as objects, for APIs that do not give them as text."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["INVALID_JSON", "arguments_object"]

INVALID_JSON = "INVALID_JSON"
"""The only key of arguments that are no JSON object; its value is the text that the model wrote."""


def arguments_object(text: str) -> dict[str, Any]:
    """Parse arguments; those of a call that was cut short, or is wrong, are kept as text under `INVALID_JSON`."""
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {INVALID_JSON: text}
    return value if isinstance(value, dict) else {INVALID_JSON: text}
