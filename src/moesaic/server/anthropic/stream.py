"""Anthropic's events as server-sent events.

It does not know what they say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from moesaic.server.errors import ApiError, error_body
from moesaic.server.streams import Answer, Form, StreamedResponse

__all__ = ["PING_SECONDS", "events_response"]

PING_SECONDS = 10.0
_encoder = msgspec.json.Encoder()


def events_response(
    answer: Answer[Any], events: AsyncIterator[Mapping[str, Any]]
) -> StreamedResponse[Mapping[str, Any]]:
    """Each event, made from an answer, under the name that is its type.

    Pings are sent while nothing comes; an exception becomes a last event "error".
    """
    form = Form(_event, _failed, _event({"type": "ping"}), PING_SECONDS)
    return StreamedResponse(events, "text/event-stream", form, answer=answer)


def _event(event: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encoder.encode(event))


def _failed(error: ApiError) -> bytes:
    return _event(error_body(error, "anthropic"))
