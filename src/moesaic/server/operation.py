"""What a route says of itself: from this the application makes routes, and the OpenAPI description.

A route module holds handlers and one tuple `OPERATIONS`. It does not know how requests are authorised or limited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Operation", "Style"]

Style = Literal["openai", "anthropic", "ollama", "plain"]
"""Whose form errors have."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path.

    Attributes:
        method: "GET" or "POST".
        path: as Starlette writes it.
        handler: answers.
        summary: a line for people.
        style: the form of its errors.
        request: the msgspec type of its body, if it takes one.
        response: the msgspec type of its answer, if that is JSON.
        stream: the media type of the streamed form of its answer, if it has one.
        public: whether it needs no key.
        needs_model: whether it is refused with 503 while no model is ready.
        statuses: that its answer may have; errors come on top.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    style: Style
    request: Any | None = None
    response: Any | None = None
    stream: Literal["text/event-stream", "application/x-ndjson"] | None = None
    public: bool = False
    needs_model: bool = True
    statuses: tuple[int, ...] = (200,)
