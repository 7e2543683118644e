"""Several streams as one: order, errors, and that all are closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from moesaic.server.openai.merge import merged


class Stream:
    """Counts up forever, or until it fails."""

    def __init__(self, fails_at: int | None = None, ends_at: int | None = None) -> None:
        self.fails_at, self.ends_at, self.closed = fails_at, ends_at, False

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            number = 0
            while number != self.ends_at:
                if number == self.fails_at:
                    raise ValueError("failed")
                yield number
                number += 1
                await asyncio.sleep(0)
        finally:
            self.closed = True


@pytest.mark.parametrize("count", [1, 3])
def test_everything_arrives_in_each_streams_order(count: int) -> None:
    async def run() -> None:
        streams = [Stream(ends_at=10 + index) for index in range(count)]
        got: list[list[int]] = [[] for _ in streams]
        async for index, each in merged([aiter(stream) for stream in streams]):
            got[index].append(each)
        assert got == [[*range(10 + index)] for index in range(count)]
        assert all(stream.closed for stream in streams)

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_or_a_close_ends_all(count: int) -> None:
    async def run() -> None:
        streams = [Stream() for _ in range(count - 1)] + [Stream(fails_at=3)]
        with pytest.raises(ValueError, match="failed"):
            async for _ in merged([aiter(stream) for stream in streams]):
                pass
        assert all(stream.closed for stream in streams)
        streams = [Stream() for _ in range(count)]
        both = merged([aiter(stream) for stream in streams])
        await anext(both)
        await both.aclose()
        assert all(stream.closed for stream in streams)

    asyncio.run(run())
