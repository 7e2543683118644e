"""Lines of JSON: one per object, and one for an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

from starlette.requests import Request

from moesaic.errors import EngineDeadError
from moesaic.server.ndjson import ndjson_response
from moesaic.server.operation import Style
from moesaic.server.streams import Answer


async def lines(style: Style, error: Exception | None) -> list[Any]:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def objects() -> AsyncGenerator[dict[str, Any], None]:
        yield {"text": "a\nb"}
        yield {"text": "ü"}
        if error is not None:
            raise error

    answer = await Answer.begin(Request({"type": "http"}, receive), objects())
    await ndjson_response(answer, answer, style)({"type": "http"}, receive, send)
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert all(message["body"].endswith(b"\n") for message in sent[1:-1])
    return [json.loads(line) for message in sent[1:] for line in message["body"].splitlines()]


def test_one_line_per_object() -> None:
    assert asyncio.run(lines("ollama", None)) == [{"text": "a\nb"}, {"text": "ü"}]


def test_an_error_is_the_last_line_in_the_form_of_the_api() -> None:
    message = "the model is not available at the moment."
    assert asyncio.run(lines("ollama", EngineDeadError("x")))[2:] == [{"error": message}]
    assert asyncio.run(lines("anthropic", EngineDeadError("x")))[2:] == [
        {"type": "error", "error": {"type": "overloaded_error", "message": message}}
    ]
    (internal,) = asyncio.run(lines("ollama", ZeroDivisionError("secret")))[2:]
    assert "secret" not in internal["error"] and internal["error"].startswith("internal error ")
