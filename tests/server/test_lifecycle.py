"""A server over real sockets: it listens while it loads, drains, and notices when its engine ends."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import httpx
import pytest
from tests.server.apps import TEST_OPERATIONS
from tests.server.fakes import ScriptedEngine
from tests.server.scripted import scripted_state

from moesaic.errors import ConfigError, ModelNotFoundError
from moesaic.server import app as app_module
from moesaic.server import lifecycle as lifecycle_module
from moesaic.server.lifecycle import Lifecycle, Load
from moesaic.server.listening import bind, url_of
from moesaic.server.metrics import Metrics
from moesaic.server.options import Limits, ServerOptions
from moesaic.server.state import Chat, ModelInfo, ServerState


class DrainingEngine(ScriptedEngine):
    """Drains as a real one: not before its requests have ended; closing breaks them off."""

    running = 0
    closed = 0

    async def generate(self, *arguments: object, **options: object) -> AsyncIterator[object]:  # type: ignore[override]
        self.running += 1
        try:
            async for chunk in super().generate(*arguments, **options):  # type: ignore[arg-type]
                yield chunk
        finally:
            self.running -= 1

    async def drain(self, timeout: float) -> bool:
        self.status = "draining"
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return not self.running

    async def close(self) -> None:
        self.closed += 1
        self.status, self.fail_after = "dead", 0


class Loader:
    """Loads the engines given, one after the other; it fails where there is an error in place of one."""

    def __init__(self, *engines: ScriptedEngine | Exception, seconds: float = 0.0) -> None:
        self.engines, self.seconds, self.loads = list(engines), seconds, 0

    async def __call__(self, metrics: Metrics) -> ServerState:
        engine = self.engines[self.loads]
        self.loads += 1
        await asyncio.sleep(self.seconds)
        if isinstance(engine, Exception):
            raise engine
        return ServerState(engine, cast(Chat, None), ModelInfo("demo"))


class Running:
    """A server under test."""

    def __init__(self, lifecycle: Lifecycle, client: httpx.AsyncClient) -> None:
        self.lifecycle, self.client = lifecycle, client
        self.ended: asyncio.Future[int] = asyncio.ensure_future(lifecycle.run())

    async def health(self) -> str:
        answer = await self.client.get("/health")
        status = str(answer.json()["status"])
        assert (answer.status_code == 200) == (status == "ok")
        return status

    async def until(self, status: str, seconds: float = 5.0) -> float:
        """Seconds until /health says so."""
        started = time.monotonic()
        while await self.health() != status:
            assert time.monotonic() - started < seconds
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    async def end(self, seconds: float = 5.0) -> int:
        return await asyncio.wait_for(self.ended, seconds)


@asynccontextmanager
async def running(load: Load, options: ServerOptions | None = None) -> AsyncIterator[Running]:
    listener = bind("127.0.0.1", 0)
    lifecycle = Lifecycle(load, options or ServerOptions(), listener)
    async with httpx.AsyncClient(base_url=url_of(listener), timeout=10) as client:
        server = Running(lifecycle, client)
        try:
            yield server
        finally:
            lifecycle.stop()
            lifecycle.stop()
            await asyncio.wait({server.ended}, timeout=5)


@pytest.fixture(autouse=True)
def small_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    real = app_module.all_operations
    monkeypatch.setattr(app_module, "all_operations", lambda options: [*real(options), *TEST_OPERATIONS])


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


def test_it_listens_while_it_loads() -> None:
    async def test() -> None:
        async with running(Loader(DrainingEngine(), seconds=0.3)) as server:
            assert await server.health() == "loading"
            refused = await server.client.post("/whole")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
            await server.until("ok")
            assert (await server.client.post("/whole")).json() == {"text": "Hello, world!"}
            server.lifecycle.stop()
            assert await server.end() == 0

    run(test)


def test_a_signal_while_it_loads_ends_it() -> None:
    async def test() -> None:
        async with running(Loader(DrainingEngine(), seconds=60)) as server:
            assert await server.health() == "loading"
            server.lifecycle.stop()
            assert await server.end(2) == 0

    run(test)


def test_running_streams_end_before_the_server_does() -> None:
    async def test() -> None:
        engine = DrainingEngine(words=["a", "b", "c", "d", "e"], delay=0.15)
        async with running(Loader(engine)) as server:
            await server.until("ok")
            async with server.client.stream("POST", "/stream") as answer:
                lines = answer.aiter_lines()
                assert await anext(lines) == "a"
                server.lifecycle.stop()
                await asyncio.sleep(0.1)
                assert await server.health() == "draining"
                refused = await server.client.post("/whole")
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                assert [line async for line in lines] == ["b", "c", "d", "e"]
            assert await server.end() == 0
            assert engine.closed == 1
            url = server.client.base_url
            with pytest.raises(OSError):
                socket.create_connection((url.host, url.port or 0), 1)

    run(test)


def test_requests_that_take_too_long_are_broken_off() -> None:
    async def test() -> None:
        engine = DrainingEngine(words=["a"] * 1000, delay=0.05)
        async with running(Loader(engine), ServerOptions(drain_seconds=0.3)) as server:
            await server.until("ok")
            request = asyncio.create_task(server.client.post("/whole"))
            await asyncio.sleep(0.1)
            started = time.monotonic()
            server.lifecycle.stop()
            assert await server.end() == 0
            assert 0.3 <= time.monotonic() - started < 2
            assert (await request).status_code == 503

    run(test)


def test_a_second_signal_does_not_wait() -> None:
    async def test() -> None:
        engine = DrainingEngine(words=["a"] * 1000, delay=0.05)
        async with running(Loader(engine)) as server:
            await server.until("ok")
            request = asyncio.create_task(server.client.post("/whole"))
            await asyncio.sleep(0.1)
            server.lifecycle.stop()
            await asyncio.sleep(0.1)
            assert not server.ended.done()
            server.lifecycle.stop()
            started = time.monotonic()
            assert await server.end() == 1
            assert time.monotonic() - started < 3
            assert server.lifecycle.left_behind
            with pytest.raises(httpx.HTTPError):
                (await request).raise_for_status()

    run(test)


def test_without_restarts_it_ends_with_its_engine() -> None:
    async def test() -> None:
        engine = DrainingEngine(words=["a", "b", "c"], delay=0.05, fail_after=2)
        async with running(Loader(engine)) as server:
            await server.until("ok")
            answer = await server.client.post("/whole")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            assert await server.health() == "dead"
            assert await server.end() == 1
            assert engine.closed == 1

    run(test)


def test_streams_end_with_an_error_when_the_engine_does() -> None:
    """All three APIs, over their own routes, in the middle of an answer."""
    turn = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    bodies = {
        "/v1/chat/completions": turn,
        "/v1/completions": {"prompt": "Hi"},
        "/v1/responses": {"input": "Hi"},
        "/v1/messages": turn,
        "/api/chat": turn,
        "/api/generate": {"prompt": "Hi"},
    }

    async def load(metrics: Metrics) -> ServerState:
        state, chat = scripted_state()
        chat.engine = DrainingEngine(words=["a", "b", "c", "d"], delay=0.2, fail_after=2)
        return ServerState(chat.engine, chat, state.model)

    async def test() -> None:
        async with running(load) as server:
            await server.until("ok")
            asked = {"model": "demo", "stream": True}
            answers = await asyncio.gather(
                *(server.client.post(path, json=asked | body) for path, body in bodies.items())
            )
            assert await server.health() == "dead"
            for path, answer in zip(bodies, answers, strict=True):
                assert answer.status_code == 200, (path, answer.text)
                assert '"error"' in answer.text.strip().splitlines()[-1] or "response.failed" in answer.text, path
                assert "not available" in answer.text, path
            assert await server.end() == 1

    run(test)


def test_a_dead_engine_is_loaded_again() -> None:
    async def test() -> None:
        first, second = DrainingEngine(), DrainingEngine(words=["again"])
        loader = Loader(first, second, seconds=0.2)
        async with running(loader, ServerOptions(on_engine_failure="restart")) as server:
            await server.until("ok")
            first.status = "dead"
            assert await server.until("dead") < 1
            await server.until("ok")
            assert loader.loads == 2 and first.closed == 1
            assert (await server.client.post("/whole")).json() == {"text": "again"}
            server.lifecycle.stop()
            assert await server.end() == 0

    run(test)


def test_nothing_of_the_old_engine_is_there_when_the_model_is_loaded_again() -> None:
    """There is memory for one model; here engine and state know each other, as parts of a model do."""
    gone, left = list[weakref.ref[object]](), list[int]()

    async def load(metrics: Metrics) -> ServerState:
        gc.collect()  # as real loading does
        left.append(sum(part() is not None for part in gone))
        engine = DrainingEngine(status="ready" if gone else "dead")
        state = ServerState(engine, cast(Chat, None), ModelInfo("demo"))
        engine.itself = engine  # type: ignore[attr-defined]
        gone.append(weakref.ref(engine))
        return state

    async def test() -> None:
        async with running(load, ServerOptions(on_engine_failure="restart")) as server:
            await server.until("ok")
            assert left == [0, 0]

    run(test)


def test_it_gives_up_after_three_restarts() -> None:
    async def test() -> None:
        dead = [DrainingEngine(status="dead") for _ in range(3)]
        loader = Loader(DrainingEngine(status="dead"), dead[0], OSError("no memory"), dead[1], dead[2])
        async with running(loader, ServerOptions(on_engine_failure="restart")) as server:
            assert await server.end() == 1
            assert loader.loads == 4

    run(test)


def test_failures_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "RESTART_WINDOW_SECONDS", 0.0)

    async def test() -> None:
        loader = Loader(*[DrainingEngine(status="dead") for _ in range(6)], DrainingEngine())
        async with running(loader, ServerOptions(on_engine_failure="restart")) as server:
            await server.until("ok")
            assert loader.loads == 7

    run(test)


def test_a_model_that_cannot_be_loaded_at_first_is_an_error() -> None:
    async def test() -> None:
        async with running(Loader(ModelNotFoundError("no such model"))) as server:
            with pytest.raises(ModelNotFoundError):
                await server.end()

    run(test)


def test_addresses_that_cannot_be_bound_say_what_to_do() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="Choose another with --port"):
        bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match="Give an address of this computer"):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize("sent", [b"", b"POST /whole HTTP/1.1\r\nhost: local"])
def test_silent_clients_are_left(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.server import listening

    monkeypatch.setattr(listening, "_HEADER_SECONDS", 0.3)

    async def test() -> None:
        async with running(Loader(DrainingEngine(words=["a"] * 10, delay=0.1))) as server:
            await server.until("ok")
            url = server.client.base_url
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()
            assert (await server.client.post("/whole")).status_code == 200  # longer than a head may take

    run(test)


def test_large_and_wrong_heads_are_refused() -> None:
    async def test() -> None:
        async with running(Loader(DrainingEngine()), ServerOptions(limits=Limits(header_bytes=2000))) as server:
            await server.until("ok")
            url = server.client.base_url
            for head in (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 3000, b"nonsense\r\n\r\n"):
                reader, writer = await asyncio.open_connection(url.host, url.port)
                writer.write(head)
                assert (await asyncio.wait_for(reader.read(), 2)).startswith(b"HTTP/1.1 400 ")
                writer.close()

    run(test)


def test_a_large_body_gets_its_answer() -> None:
    async def test() -> None:
        async with running(Loader(DrainingEngine()), ServerOptions(limits=Limits(body_bytes=1000))) as server:
            await server.until("ok")
            assert (await server.client.post("/v1/echo", content=b"x" * 5_000_000)).status_code == 413
            assert (await server.client.post("/v1/echo", content=b"x")).json() == {"length": 1}

    run(test)
