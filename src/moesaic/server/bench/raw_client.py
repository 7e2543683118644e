"""Streams of `/v1/completions` read as cheaply as Python can: bytes and when they came, understood afterwards.

    python -m moesaic.server.bench.raw_client HOST PORT STREAMS BODY > arrivals.json

It asks servers of `local` only, whose texts are numbers of tokens. Only `latency` is meant to call it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from itertools import pairwise

__all__ = ["arrivals_of", "main"]

_TOKEN = re.compile(rb'"text":"(?: (\d+))"')
_STATUS = re.compile(rb"HTTP/1\.1 200 ")


class _Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def arrivals_of(pieces: list[tuple[float, bytes]]) -> list[tuple[int, float]]:
    """Tokens of a stream, each with when the last byte that shows it came.

    Args:
        pieces: bytes of the answer and when they came, its head included.

    Raises:
        ValueError: the answer is no success.
    """
    content = b"".join(data for _, data in pieces)
    if _STATUS.match(content) is None:
        raise ValueError(f"the server answers {content[:200]!r}")
    ends = [0]
    for _, data in pieces:
        ends.append(ends[-1] + len(data))
    found, piece = [], 0
    spans = list(pairwise(ends))
    for token in _TOKEN.finditer(content):
        while spans[piece][1] < token.end():
            piece += 1
        found.append((int(token[1]), pieces[piece][0]))
    return found


async def _ask(host: str, port: int, streams: int, body: bytes) -> list[tuple[int, float]]:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(streams):
        _, stream = await loop.create_connection(lambda: _Stream(head.encode() + body), host, port)
        made.append(stream)
    await asyncio.gather(*(stream.ended for stream in made))
    return [arrival for stream in made for arrival in arrivals_of(stream.pieces)]


def main() -> None:
    """Ask, and write what came when."""
    host, port, streams, body = sys.argv[1:]
    json.dump(asyncio.run(_ask(host, int(port), int(streams), body.encode())), sys.stdout)


if __name__ == "__main__":
    main()
