"""Minutes of requests, a fifth of them given up: afterwards the server holds what it held before."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.served import Served, served

SECONDS = 120.0
_CLIENTS = 24
_WARM_UP_SECONDS = 60.0  # by then all of the cache has been touched
_MAX_GROWTH = 48 << 20


def held(server: Served) -> dict[str, float]:
    """File descriptors and bytes of the process; requests, and blocks that they hold, of its engine."""
    process = Path(f"/proc/{server.process.pid}")
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    counted = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    return {
        "fds": len(list((process / "fd").iterdir())),
        "bytes": int((process / "statm").read_text().split()[1]) * 4096,
        "requests": counted["moesaic_requests_running"] + counted["moesaic_requests_waiting"],
        "blocks": counted['moesaic_kv_blocks{state="used"}'],
    }


def settled(server: Served, seconds: float = 40.0) -> dict[str, float]:
    """What it holds when connections that nobody uses have been closed."""
    deadline = time.monotonic() + seconds
    before = held(server)
    while time.monotonic() < deadline:
        time.sleep(1)
        now = held(server)
        if now["fds"] == before["fds"] and now["requests"] == now["blocks"] == 0:
            return now
        before = now
    return before


async def load(url: str, seconds: float, rng: random.Random) -> dict[int, int]:
    """Ask for so long; answers by their status, -1 for those given up."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            while time.monotonic() < end:
                status = await ask(http, f"What is {rng.randrange(100)} + {rng.randrange(100)}?")
                statuses[status] = statuses.get(status, 0) + 1

    async def ask(http: httpx.AsyncClient, question: str) -> int:
        messages = [{"role": "user", "content": question * rng.choice((1, 1, 20))}]
        body: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": rng.randrange(1, 80)}
        path = rng.choice(("/v1/chat/completions", "/v1/messages", "/api/chat"))
        body["stream"] = rng.random() < 0.7
        given_up = rng.random() < 0.2
        try:
            async with asyncio.timeout(rng.uniform(0.01, 1.0) if given_up else None):
                return (await http.post(path, json=body)).status_code
        except TimeoutError:
            return -1

    await asyncio.gather(*map(client, range(_CLIENTS)))
    return statuses


@pytest.mark.slow
def test_everything_is_given_back() -> None:
    rng = random.Random(1)
    with served("demo", "--max-batch", "16", "--kv-cache", "8MiB") as server:
        server.wait_ready()
        asyncio.run(load(server.url, _WARM_UP_SECONDS, rng))
        before = settled(server)
        statuses = asyncio.run(load(server.url, SECONDS, rng))
        after = settled(server)
        print(statuses, before, after)
        assert statuses[200] > 100 and statuses[-1] > 10
        assert statuses.keys() <= {200, -1}
        assert (after["requests"], after["blocks"]) == (0, 0)
        assert after["fds"] <= before["fds"]
        assert after["bytes"] - before["bytes"] < _MAX_GROWTH
