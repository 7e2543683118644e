"""Several streams as one.

It does not know what is in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

from moesaic.server.streams import closing

__all__ = ["merged"]

T = TypeVar("T")


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """What streams give, as it comes, with the stream's number; the first exception of any ends all.

    All are closed at the end, and when the generator is closed.
    """
    if len(streams) == 1:
        async with closing(streams[0]) as only:
            async for each in only:
                yield 0, each
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(maxsize=2 * len(streams))
    tasks = [asyncio.create_task(_feed(queue, index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    queue: asyncio.Queue[tuple[int, T] | BaseException | None], index: int, stream: AsyncIterator[T]
) -> None:
    try:
        async with closing(stream):
            async for each in stream:
                await queue.put((index, each))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
