"""Pieces of answers, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from tests.server.scripted import STATS

from moesaic.engine.serving.outputs import Chunk
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.ollama.answers import Piece, chunk_pieces, event_pieces, joined


@pytest.mark.parametrize(("make", "first"), [(event_pieces, TextDelta(0, "a")), (chunk_pieces, Chunk(0, "a"))])
def test_pieces_that_are_closed_close_what_they_are_made_from(make: Callable[..., Any], first: Any) -> None:
    closed = False

    async def source() -> AsyncGenerator[Any, None]:
        nonlocal closed
        try:
            while True:
                yield first
        finally:
            closed = True

    async def read_one() -> None:
        events = source()  # held here, so that nothing but closing ends it
        pieces = make(events)
        assert (await anext(pieces)).text == "a"
        await pieces.aclose()
        assert closed

    asyncio.run(read_one())


async def whole(*events: Event) -> Piece:
    async def source() -> AsyncGenerator[Event, None]:
        for event in events:
            yield event

    return await joined(event_pieces(source()))


def test_calls_between_text_and_thoughts() -> None:
    made = asyncio.run(
        whole(
            ToolCallDelta(0, 0, '{"a":', "x", "f"),
            ToolCallDelta(0, 0, "1}"),
            ReasoningDelta(0, "hm"),
            TextDelta(0, "t"),
            ToolCallDelta(0, 1, '{"b": 2', "y", "g"),
            Finished(0, "length", STATS),
        )
    )
    assert (made.text, made.thinking) == ("t", "hm")
    assert [(each.id, each.function.name, each.function.index) for each in made.calls] == [("x", "f", 0), ("y", "g", 1)]
    assert [each.function.arguments for each in made.calls] == [{"a": 1}, {"INVALID_JSON": '{"b": 2'}]
    assert made.last is not None and made.last.reason == "length"
