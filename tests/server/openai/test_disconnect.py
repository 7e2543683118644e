"""A client that goes away, over a socket: the engine is told within moments, whatever was asked and however."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import openai
import pytest
import uvicorn
from tests.server.openai.fakes import Served

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 100_000}
RESPONSE: dict[str, Any] = {"model": "tiny", "input": "Hi"}


@asynccontextmanager
async def over_a_socket(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(served.app, log_level="error", lifespan="off"))
        running = asyncio.create_task(server.serve([listening]))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        try:
            async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
                yield client
        finally:
            server.should_exit = True
            await running


def patient() -> Served:
    """A server whose engine has much to say."""
    served = Served()
    served.engine.words = ["word "] * 10_000
    served.engine.delay = 0.005
    return served


async def until_cancelled(served: Served, count: int) -> None:
    async with asyncio.timeout(5):
        while served.engine.cancelled < count:
            await asyncio.sleep(0.01)
    assert served.engine.cancelled == count == len(served.engine.asked)


CALLS: list[tuple[str, dict[str, Any], int]] = [
    ("chat.completions", CHAT, 1),
    ("completions", COMPLETION, 2),
    ("responses", RESPONSE, 1),
]


def method(client: openai.AsyncOpenAI, name: str) -> Any:
    found: Any = client
    for part in name.split("."):
        found = getattr(found, part)
    return found.create


@pytest.mark.parametrize(("name", "body", "requests"), CALLS)
def test_in_mid_stream(name: str, body: dict[str, Any], requests: int) -> None:
    async def run() -> None:
        served = patient()
        async with over_a_socket(served) as client:
            stream = await method(client, name)(**body, stream=True)
            for _ in range(3):
                await anext(stream)
            assert served.engine.cancelled == 0
            await stream.close()
            await until_cancelled(served, requests)

    asyncio.run(run())


@pytest.mark.parametrize(("name", "body", "requests"), CALLS)
def test_while_it_waits_for_the_whole(name: str, body: dict[str, Any], requests: int) -> None:
    async def run() -> None:
        served = patient()
        async with over_a_socket(served) as client:
            asking = asyncio.create_task(method(client, name)(**body))
            while len(served.engine.asked) < requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            await until_cancelled(served, requests)

    asyncio.run(run())


def test_while_it_waits_for_the_first_piece() -> None:
    async def run() -> None:
        served = patient()
        served.engine.delay = 60
        async with over_a_socket(served) as client:
            asking = asyncio.create_task(client.chat.completions.create(**CHAT, stream=True))
            while not served.engine.asked:
                await asyncio.sleep(0.01)
            asking.cancel()
            await until_cancelled(served, 1)

    asyncio.run(run())


def test_pieces_come_when_they_are_made() -> None:
    async def run() -> None:
        served = Served()
        served.engine.words, served.engine.delay = ["a", "b", "c"], 0.1
        async with over_a_socket(served) as client:
            loop = asyncio.get_running_loop()
            times = [
                loop.time()
                async for chunk in await client.chat.completions.create(**CHAT, stream=True)
                if chunk.choices[0].delta.content
            ]
        assert times[1] - times[0] > 0.05 and times[2] - times[1] > 0.05

    asyncio.run(run())


def test_a_client_that_reads_no_more_and_goes() -> None:
    """The stream stands where it sends, not where it waits for the engine; still nothing is left behind."""

    async def run() -> None:
        served = patient()
        served.engine.delay = 0.0
        gone, sent, full = asyncio.Event(), 0, asyncio.Event()
        bodies = [{"type": "http.request", "body": msgspec.json.encode({**CHAT, "stream": True}), "more_body": False}]

        async def receive() -> Any:
            if bodies:
                return bodies.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 10:
                full.set()
                await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": headers,
        }
        answering = asyncio.create_task(served.app(scope, receive, send))
        await full.wait()
        gone.set()
        await answering
        assert served.engine.cancelled == 1  # at once, not when the garbage is collected

    asyncio.run(run())
