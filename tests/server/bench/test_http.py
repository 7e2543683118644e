"""The client of a load and the local server: over real sockets, with engines that need no model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from tests.engine.serving.fake_runner import FakeRunner, answer_to, prompt
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.bench.drive import run_closed, run_open
from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.errors import ConfigError
from moesaic.server.bench.client import ask_from_another_process
from moesaic.server.bench.http_target import HttpTarget
from moesaic.server.bench.local import local_server

REQUEST = BenchRequest((1, 2, 3), 4)


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(main, 120)

    asyncio.run(limited())


def fake_engine() -> AsyncEngine:
    return AsyncEngine(lambda: Engine(FakeRunner(), None, GenerationDefaults({"do_sample": False})))


def test_every_token_comes_as_a_piece() -> None:
    async def main() -> None:
        engine = fake_engine()
        engine.start()
        await engine.wait_ready()
        ids = prompt(1, 40)
        async with local_server(engine, "fake") as url:
            async with HttpTarget(url + "/v1") as target:
                assert target.model == "fake"
                first, again = await run_closed(target, [BenchRequest(tuple(ids), 7)] * 2, 1)
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                body = {"model": "fake", "prompt": ids, "max_tokens": 7, "temperature": 0}
                answer = (await client.post("/v1/completions", json=body)).json()
                by_text = await client.post("/v1/completions", json=body | {"prompt": "text"})
        assert first.error is None and first.counts == [1] * 7
        assert (first.prompt_tokens, first.generated_tokens, first.cached_tokens) == (40, 7, 0)
        assert again.cached_tokens == 36  # whole blocks of 4, but not the last token
        assert first.asked < first.times[0] < first.times[-1] <= first.ended
        assert answer["choices"][0]["text"] == "".join(f" {token}" for token in answer_to(ids, 7))
        assert by_text.status_code == 400 and "no tokenizer" in by_text.text
        await engine.close()

    run(main())


def test_another_process_asks() -> None:
    async def main() -> None:
        engine = fake_engine()
        engine.start()
        await engine.wait_ready()
        asked = [BenchRequest(tuple(prompt(number, 8)), 3) for number in range(4)]
        async with local_server(engine, "fake") as url:
            closed = await ask_from_another_process(url, asked, users=2)
            opened = await ask_from_another_process(url, asked, times=[0.0, 0.1, 0.2, 0.3])
        assert [record.user for record in closed] == [0, 0, 1, 1]
        assert [record.generated_tokens for record in closed + opened] == [3] * 8
        assert opened[3].asked - opened[0].asked == pytest.approx(0.3)
        await engine.close()

    run(main())


def test_failures_are_told_as_the_server_tells_them() -> None:
    async def main() -> None:
        engine = ScriptedEngine(overloaded=True)
        async with local_server(engine, "scripted") as url, HttpTarget(url) as target:
            (busy,) = await run_open(target, [REQUEST], [0.0])
            engine.overloaded, engine.fail_after = False, 2
            (died,) = await run_open(target, [REQUEST], [0.0])
        async with HttpTarget(url, model="scripted") as target:
            (gone,) = await run_open(target, [REQUEST], [0.0])
        assert busy.error is not None and busy.error.startswith("429: ")
        assert died.error is not None and died.error.startswith("in the stream: ") and len(died.times) == 2
        assert gone.error is not None and gone.error.startswith("ConnectError")

    run(main())


def test_a_server_that_is_not_there_or_lists_nothing() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:9/v1/models"):
            async with HttpTarget("http://127.0.0.1:9"):
                pass
        async with local_server(ScriptedEngine(), "scripted") as url:
            with pytest.raises(ConfigError, match="answers 404"):
                async with HttpTarget(url + "/nowhere"):
                    pass

    run(main())
