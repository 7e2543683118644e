"""Streams of JSON objects, one per line.

It does not know what the objects say.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from moesaic.server.errors import error_body
from moesaic.server.operation import Style
from moesaic.server.streams import Answer, StreamedResponse, closing, error_in_stream

__all__ = ["MEDIA_TYPE", "ndjson_response"]

MEDIA_TYPE = "application/x-ndjson"
_encoder = msgspec.json.Encoder()


def ndjson_response(answer: Answer[Any], objects: AsyncIterator[Any], style: Style) -> StreamedResponse:
    """Each object, made from an answer, as a line; an exception becomes a last line with an error in the API's form."""
    return StreamedResponse(_lines(objects, style), MEDIA_TYPE, answer=answer)


async def _lines(objects: AsyncIterator[Any], style: Style) -> AsyncGenerator[bytes, None]:
    async with closing(objects):
        try:
            async for each in objects:
                yield _encoder.encode(each) + b"\n"
        except Exception as error:
            yield _encoder.encode(error_body(error_in_stream(error), style)) + b"\n"
