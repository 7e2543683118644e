"""Nothing is left behind: after random requests, a fifth of them given up, everything is as it was before.

`--soak-seconds N` makes it longer.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from tests.server.soak import GIVES_UP, Traffic

from moesaic.engine.serving.answer import Answer
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.kvcache.paged import PagedSequence
from moesaic.server.app import build_app
from moesaic.server.listening import WebServer, bind, make_web_server, url_of
from moesaic.server.loading import ModelOptions, loader
from moesaic.server.metrics import Metrics
from moesaic.server.options import ServerOptions
from moesaic.server.state import ServerState

USERS = 12
KV_CACHE = 4 << 20
WARM_UP_SHARE = 0.3
GROWTH_BYTES = 40 << 20
OF_REQUESTS = (Answer, RequestSampler, PagedSequence, Request)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@dataclass(frozen=True)
class Held:
    """What this process holds while no request is under way."""

    descriptors: int
    tasks: int
    objects: dict[str, int]
    resident: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        alive = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            descriptors=len(os.listdir("/proc/self/fd")),
            tasks=len(asyncio.all_tasks()),
            objects={kind.__name__: sum(type(each) is kind for each in alive) for kind in OF_REQUESTS},
            resident=pages * os.sysconf("SC_PAGESIZE"),
        )


class Server:
    """The application on a real socket in this process."""

    def __init__(self, state: ServerState, engine: Engine, web: WebServer, url: str) -> None:
        self.state, self.engine, self.web, self.url = state, engine, web, url

    async def soak(self, seconds: float, seed: int) -> Traffic:
        async with httpx.AsyncClient(base_url=self.url, timeout=300, trust_env=False) as client:
            traffic = Traffic(client, seed)
            await traffic.run(USERS, seconds)
            await until(lambda: not self.engine.has_work and self.web.num_running == 0)
        await until(lambda: not self.web.server_state.connections)
        await asyncio.sleep(0.5)  # closed sockets leave the event loop
        return traffic

    def check_engine(self) -> None:
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.blocks_free + stats.blocks_cached == stats.blocks
        assert sum(count for _, count in stats.finished) > 0


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    options, metrics = ServerOptions(port=0), Metrics()
    load = loader(ModelOptions("demo", serving=(("kv_cache", KV_CACHE), ("max_batch", 8))))
    state = await load(metrics)
    engine = state.engine._engine  # type: ignore[attr-defined]
    assert isinstance(engine, Engine)
    listener = bind(options.host, options.port)
    web = make_web_server(build_app(state, options, metrics=metrics), options)
    task = asyncio.create_task(web.serve(sockets=[listener]))
    try:
        yield Server(state, engine, web, url_of(listener))
    finally:
        web.should_exit = True
        await asyncio.wait({task}, timeout=10)
        await state.engine.close()
        listener.close()


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to rest"
        await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
def test_nothing_is_left_behind(soak_seconds: float) -> None:
    async def main() -> None:
        async with serving() as server:
            from_others = Held.now().objects  # what other tests in this process hold
            await server.soak(WARM_UP_SHARE * soak_seconds, 1)
            before = Held.now()
            traffic = await server.soak((1 - WARM_UP_SHARE) * soak_seconds, 2)
            after = Held.now()
            report(traffic, server, before, after)
            assert traffic.wrong == []
            assert traffic.outcomes["answered"] > traffic.asked / 2
            assert 0 < traffic.outcomes["cancelled"] <= traffic.asked / GIVES_UP
            server.check_engine()
            assert all(count <= from_others[kind] for kind, count in after.objects.items()), after.objects
            assert after.tasks == before.tasks
            assert after.descriptors <= before.descriptors
            assert after.resident - before.resident < GROWTH_BYTES
            cache = server.engine._cache
            assert cache is not None and len(cache) > 0
            cache.clear()  # the engine's thread sleeps
            pool = server.engine.runner.pool
            assert pool.num_free == pool.num_blocks

    asyncio.run(main())


def report(traffic: Traffic, server: Server, before: Held, after: Held) -> None:
    stats = server.engine.stats()
    print(f"\n{dict(traffic.outcomes)}; {stats.generated_tokens} tokens, {stats.preemptions} preemptions")
    print(f"{stats.cached_tokens} of {stats.prompt_tokens} tokens of prompts from the cache; {dict(stats.finished)}")
    print(f"descriptors {before.descriptors} -> {after.descriptors}, tasks {before.tasks} -> {after.tasks}")
    print(f"resident {before.resident / 2**20:.1f} -> {after.resident / 2**20:.1f} MiB")
    for text in traffic.wrong[:10]:
        print("wrong:", text)
