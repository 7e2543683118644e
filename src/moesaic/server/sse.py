"""Server-sent events (WHATWG HTML, section 9.2): an answer as a stream, piece by piece.

Errors before the first piece are errors of HTTP; later ones are events in the API's form. While nothing comes, comments
keep the connection open. It does not know what the events mean.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request

from moesaic.server.errors import ApiError
from moesaic.server.streams import Answer, Form, StreamedResponse

__all__ = ["DONE", "MEDIA_TYPE", "event", "event_stream"]

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
"""Ends a stream of OpenAI's chat and completions."""
GRACE = 5.0
"""Seconds that an error has to come as an error of HTTP; then the stream begins, so that clients see that it lives."""
KEEP_ALIVE = 10.0
"""Seconds of silence after which a comment is sent; proxies give up after 30 to 60."""
_COMMENT = b": keep-alive\n\n"
_ENCODER = msgspec.json.Encoder()


def event(data: Any, name: str | None = None) -> bytes:
    """An event as it goes over the wire.

    Args:
        data: encoded as JSON, which has no line breaks.
        name: the event's type, if the API names them.
    """
    body = _ENCODER.encode(data)
    return b"data: %b\n\n" % body if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), body)


async def event_stream(
    request: Request, pieces: AsyncIterator[bytes], failed: Callable[[ApiError], bytes]
) -> StreamedResponse[bytes]:
    """The response that sends `pieces`.

    Args:
        request: whose client is watched; its body must have been read.
        pieces: events as of `event`; closed at the end and when the client goes away.
        failed: makes the last event of a stream that ends with an error.

    Raises:
        Exception: what `pieces` raises before its first piece, if that comes within `GRACE`.
        ApiError: 499 if the client goes before.
    """
    answer = await Answer.begin(request, pieces, GRACE)
    form = Form(_as_it_is, failed, _COMMENT, KEEP_ALIVE)
    return StreamedResponse(answer, MEDIA_TYPE, form, answer=answer)


def _as_it_is(piece: bytes) -> bytes:
    return piece
