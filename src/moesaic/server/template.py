"""A chat template as a program of limited time and size, with the names that transformers offers to templates.

A template is code of the model's author, and hostile in the worst case: it runs in a sandbox with limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError

from moesaic.errors import RequestError, TokenizerError
from moesaic.server.sandbox import LimitedEnvironment, TooMuchError

__all__ = ["ChatTemplate", "TemplateLimits"]


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """How much one rendering may take.

    Attributes:
        seconds: of time.
        characters: of any text in it.
        items: of any list in it.
    """

    seconds: float = 5.0
    characters: int = 32 << 20
    items: int = 1_000_000


class ChatTemplate:
    """Renders conversations.

    Args:
        source: Jinja.
        limits: of one rendering.

    Raises:
        TokenizerError: it is no valid template.
    """

    def __init__(self, source: str, limits: TemplateLimits | None = None) -> None:
        self.source = source
        self._limits = limits or TemplateLimits()
        self._environment = LimitedEnvironment(self._limits.characters, self._limits.items)
        self._environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._environment.add_filter("tojson", _to_json)
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TokenizerError(f"the chat template is damaged: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the template refuses it, fails, or takes too much time or room.
        """
        self._environment.begin(self._limits.seconds)
        try:
            return self._template.render(**variables)
        except TooMuchError as error:
            raise RequestError(f"the chat template takes too much {error} for this conversation.", "messages") from None
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses this conversation: {error}", "messages") from None
        except Exception as error:  # a template may raise anything
            message = f"the chat template cannot render this conversation ({type(error).__name__})."
            raise RequestError(message, "messages") from error


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


def _raise_exception(message: Any) -> NoReturn:
    raise _RefusedError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:1000])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
