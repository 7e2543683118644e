"""Anthropic's events as server-sent events.

It does not know what they say.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import msgspec

from moesaic.server.errors import error_body
from moesaic.server.streams import Answer, StreamedResponse, closing, error_in_stream

__all__ = ["PING_SECONDS", "events_response"]

PING_SECONDS = 10.0
_encoder = msgspec.json.Encoder()


def events_response(answer: Answer[Any], events: AsyncIterator[Mapping[str, Any]]) -> StreamedResponse:
    """Each event, made from an answer, under the name that is its type.

    Pings are sent while nothing comes; an exception becomes a last event "error".
    """
    ping = _event({"type": "ping"})
    return StreamedResponse(_written(events), "text/event-stream", None, ping, PING_SECONDS, answer)


def _event(event: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encoder.encode(event))


async def _written(events: AsyncIterator[Mapping[str, Any]]) -> AsyncGenerator[bytes, None]:
    async with closing(events):
        try:
            async for event in events:
                yield _event(event)
        except Exception as error:
            yield _event(error_body(error_in_stream(error), "anthropic"))
