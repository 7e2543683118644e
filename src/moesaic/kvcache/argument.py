"""The name under which transformers hands the cache to `generate()` and to modules: it changed in 5.24."""

from __future__ import annotations

from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

__all__ = ["CACHE_ARGUMENT", "given_cache"]

_NAMES = ("cache", "past_key_values")

CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
"""The name in the version that is installed."""


def given_cache(arguments: dict[str, Any]) -> Any | None:
    """The cache among keyword arguments, under its present or its former name; None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)
