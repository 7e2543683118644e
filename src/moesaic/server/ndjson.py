"""Streams of JSON objects, one per line.

It does not know what the objects say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from moesaic.server.errors import ApiError, error_body
from moesaic.server.operation import Style
from moesaic.server.streams import Answer, Form, StreamedResponse

__all__ = ["MEDIA_TYPE", "ndjson_response"]

MEDIA_TYPE = "application/x-ndjson"
_encoder = msgspec.json.Encoder()


def ndjson_response(answer: Answer[Any], objects: AsyncIterator[Any], style: Style) -> StreamedResponse[Any]:
    """Each object, made from an answer, as a line; an exception becomes a last line with an error in the API's form."""

    def failed(error: ApiError) -> bytes:
        return _line(error_body(error, style))

    return StreamedResponse(objects, MEDIA_TYPE, Form(_line, failed), answer=answer)


def _line(value: Any) -> bytes:
    return _encoder.encode(value) + b"\n"
