"""The engine for an event loop, on a fake runner in real time: streams, cancelling, overload, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.engine.serving.fake_runner import GREEDY, FakeRunner, answer_to, prompt

from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.core import Engine, EngineOptions
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import EngineDeadError, GenerationError, OverloadedError, RequestError

FOREVER = SamplingParams(temperature=0, max_tokens=100000)


class SlowRunner(FakeRunner):
    """Steps take a millisecond."""

    def decode(self, *args: Any) -> Any:
        time.sleep(0.001)
        return super().decode(*args)


def factory(runner: FakeRunner, **options: Any) -> Callable[[], Engine]:
    defaults = GenerationDefaults({"do_sample": False})
    return lambda: Engine(runner, None, defaults, options=EngineOptions(**options))


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(main, 60)

    asyncio.run(limited())


async def collect(engine: AsyncEngine, ids: list[int], params: SamplingParams = GREEDY) -> list[Completion]:
    done = [Completion(index) for index in range(params.n)]
    async for chunk in engine.generate(ids, params):
        done[chunk.index].add(chunk)
    return done


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_many_streams_get_their_own_answers() -> None:
    async def main() -> None:
        engine = AsyncEngine(factory(FakeRunner(num_blocks=2000)))
        engine.start()
        await engine.wait_ready()
        assert engine.status == "ready"
        assert engine.context_length == 8000
        params = SamplingParams(temperature=0, max_tokens=20, n=2)
        answers = await asyncio.gather(*(collect(engine, prompt(number, 10 + number), params) for number in range(40)))
        for number, pair in enumerate(answers):
            for answer in pair:
                assert answer.token_ids == answer_to(prompt(number, 10 + number), 20)
                assert answer.finish_reason == "length"
        await until(lambda: engine.stats().generated_tokens == 1600)
        assert engine.stats().running == 0
        await engine.close()

    run(main())


def test_closing_a_stream_cancels_its_request() -> None:
    async def main() -> None:
        runner = SlowRunner(num_blocks=3000)
        engine = AsyncEngine(factory(runner, prefix_cache=False))
        engine.start()
        await engine.wait_ready()
        stream = engine.generate(prompt(0, 20), FOREVER)
        async for chunk in stream:
            assert chunk.finish_reason is None
            break
        await stream.aclose()

        async def give_up(ids: list[int]) -> None:
            await asyncio.wait_for(collect(engine, ids, FOREVER), 0.05)

        results = await asyncio.gather(*(give_up(prompt(n, 9)) for n in range(5)), return_exceptions=True)
        assert all(isinstance(result, TimeoutError) for result in results)
        await until(lambda: dict(engine.stats().finished) == {"cancelled": 6})
        await until(lambda: engine.stats().blocks_free == 3000)
        assert runner.pool.num_free == 3000
        await engine.close()

    run(main())


def test_wrong_requests_are_refused_and_too_many_turned_away() -> None:
    async def main() -> None:
        engine = AsyncEngine(factory(SlowRunner(num_blocks=4000), max_running=2), max_waiting=3)
        with pytest.raises(OverloadedError, match="still being loaded"):
            await collect(engine, [1])
        engine.start()
        await engine.wait_ready()
        with pytest.raises(RequestError, match="empty"):
            await collect(engine, [])
        with pytest.raises(OverloadedError):
            await collect(engine, [1], SamplingParams(n=4))
        tasks = [asyncio.create_task(collect(engine, prompt(n, 5), FOREVER)) for n in range(2)]
        await until(lambda: engine.stats().running == 2)
        tasks += [asyncio.create_task(collect(engine, prompt(n, 5))) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 answers wait already") as info:
            await collect(engine, [1])
        assert info.value.retry_after >= 1
        for task in tasks[:2]:
            task.cancel()
        assert [answers[0].finish_reason for answers in await asyncio.gather(*tasks[2:])] == ["length"] * 3
        await engine.close()

    run(main())


def test_an_engine_that_fails_tells_everybody() -> None:
    async def main() -> None:
        runner, ends = SlowRunner(num_blocks=4000), list[str]()
        engine = AsyncEngine(factory(runner), on_end=ends.append)
        engine.start()
        await engine.wait_ready()
        tasks = [asyncio.create_task(collect(engine, prompt(n, 5), FOREVER)) for n in range(3)]
        await until(lambda: engine.stats().running == 3)
        runner.failures = [RuntimeError("the computer is on fire")]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert all("fire" not in str(result) for result in results)
        assert engine.status == "dead"
        assert engine.error is not None
        assert "RuntimeError: the computer is on fire" in engine.error
        assert ends == [engine.error]
        with pytest.raises(EngineDeadError):
            await collect(engine, [1])
        assert await engine.drain(1)
        await engine.close()
        assert runner.closed

    run(main())


def test_a_request_that_cannot_be_begun_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = AsyncEngine(factory(FakeRunner()))
        engine.start()
        loaded = await engine.wait_ready()
        monkeypatch.setattr(loaded._intake, "answers", lambda *args: [][0])
        with pytest.raises(GenerationError, match="cannot be answered"):
            await collect(engine, [1])
        monkeypatch.undo()
        assert (await collect(engine, prompt(0, 5)))[0].token_ids == answer_to(prompt(0, 5), 12)
        await engine.close()

    run(main())


def test_an_engine_that_cannot_be_loaded() -> None:
    def broken() -> Engine:
        raise ValueError("no such model")

    async def main() -> None:
        engine = AsyncEngine(broken)
        engine.start()
        with pytest.raises(EngineDeadError, match="no such model"):
            await engine.wait_ready()
        assert engine.status == "dead"
        await engine.close()

    run(main())


def test_draining_finishes_what_runs_and_takes_no_more() -> None:
    async def main() -> None:
        engine = AsyncEngine(factory(SlowRunner(num_blocks=40000)))
        engine.start()
        await engine.wait_ready()
        short = asyncio.create_task(collect(engine, prompt(0, 5)))
        long = asyncio.create_task(collect(engine, prompt(1, 5), FOREVER))
        await until(lambda: engine.stats().running >= 1)
        assert not await engine.drain(0.2)
        assert engine.status == "draining"
        assert (await short)[0].token_ids == answer_to(prompt(0, 5), 12)
        with pytest.raises(EngineDeadError, match="draining"):
            await collect(engine, [1])
        drained = asyncio.create_task(engine.drain(10))
        await asyncio.sleep(0)
        long.cancel()
        assert await drained
        await engine.close()
        assert engine.status == "dead"

    run(main())


def test_closing_ends_streams() -> None:
    async def main() -> None:
        runner = SlowRunner(num_blocks=40000)
        ends = list[str]()
        engine = AsyncEngine(factory(runner), on_end=ends.append)
        engine.start()
        await engine.wait_ready()
        task = asyncio.create_task(collect(engine, prompt(0, 5), FOREVER))
        await until(lambda: engine.stats().running == 1)
        await engine.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await task
        assert runner.closed
        assert runner.pool.num_free == 40000
        assert ends == []

    run(main())


def test_closing_does_not_wait_for_a_load() -> None:
    runner, loaded, may_load = FakeRunner(), threading.Event(), threading.Event()

    def load() -> Engine:
        may_load.wait(30)
        loaded.set()
        return factory(runner)()

    async def main() -> None:
        engine = AsyncEngine(load)
        engine.start()
        await engine.close()
        assert not loaded.is_set()
        assert engine.status == "dead"
        with pytest.raises(EngineDeadError, match="was closed"):
            await engine.wait_ready()
        may_load.set()
        await until(lambda: runner.closed)  # what was loaded after all is given back
        assert engine.status == "dead"

    run(main())


def test_an_idle_engine_uses_no_processor() -> None:
    async def main() -> None:
        engine = AsyncEngine(factory(FakeRunner()))
        engine.start()
        await engine.wait_ready()
        await collect(engine, prompt(0, 5))
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.05
        await engine.close()

    run(main())


class HeldRunner(FakeRunner):
    """Each of its steps ends when it may."""

    def __init__(self) -> None:
        super().__init__(num_blocks=200)
        self.permits, self.steps = threading.Semaphore(1), 0  # the prompt's

    def decode(self, sequences: Any, token_ids: Any) -> Any:
        self.on_launch()
        self.steps += 1
        assert self.permits.acquire(timeout=30)
        return super().decode(sequences, token_ids)

    def start_prefill(self, parts: Any) -> Any:
        assert self.permits.acquire(timeout=30)
        return super().start_prefill(parts)


def test_tokens_are_handed_over_while_the_next_step_computes() -> None:
    """Neither before it is launched, where who gets them would be in its way, nor only behind it."""

    async def main() -> None:
        runner, found = HeldRunner(), list[tuple[int, int]]()
        engine = AsyncEngine(factory(runner))
        engine.start()
        await engine.wait_ready()

        async def ask() -> None:
            async for chunk in engine.generate(prompt(1, 9), SamplingParams(temperature=0, max_tokens=4)):
                found.extend((token, runner.steps) for token in chunk.token_ids)

        asked = asyncio.create_task(ask())
        for count in (1, 2, 3):
            await until(lambda count=count: len(found) == count)  # type: ignore[misc]
            await until(lambda count=count: runner.steps == count)  # type: ignore[misc]
            await asyncio.sleep(0.02)
            assert len(found) == count  # the step that is launched is under way
            runner.permits.release()
        await asked  # there is no step behind the last
        assert [token for token, _ in found] == answer_to(prompt(1, 9), 4)
        await engine.close()

    run(main())


class PreparingRunner(FakeRunner):
    """Has something to prepare in pieces of some milliseconds."""

    def __init__(self, pieces: int, seconds: float = 0.01) -> None:
        super().__init__(num_blocks=2000)
        self.pieces, self.seconds, self.most = pieces, seconds, 0
        self.in_piece, self.pieces_at_decode = threading.Event(), list[int]()

    def prepare(self, num_sequences: int) -> bool:
        if not self.pieces:
            return False
        self.most = num_sequences
        self.in_piece.set()
        time.sleep(self.seconds)
        self.pieces -= 1
        return True

    def decode(self, *args: Any) -> Any:
        self.pieces_at_decode.append(self.pieces)
        return super().decode(*args)


def test_an_idle_engine_prepares_and_gives_way() -> None:
    """Who comes waits for one piece at most, and the rest is done when all are answered."""

    async def main() -> None:
        runner = PreparingRunner(30)
        engine = AsyncEngine(factory(runner, max_running=12))
        engine.start()
        await engine.wait_ready()
        await until(runner.in_piece.is_set)
        left = runner.pieces
        answer = (await collect(engine, prompt(0, 9)))[0]
        assert answer.token_ids == answer_to(prompt(0, 9), len(answer.token_ids))
        assert left - runner.pieces_at_decode[0] <= 2  # one was counted too late
        assert len(set(runner.pieces_at_decode)) == 1
        await until(lambda: runner.pieces == 0)
        assert runner.most == 12
        await engine.close()

    run(main())


def test_what_cannot_be_prepared_ends_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        runner = PreparingRunner(3)
        runner.prepare = lambda num_sequences: 1 // 0  # type: ignore[method-assign,assignment]
        engine = AsyncEngine(factory(runner))
        engine.start()
        await engine.wait_ready()
        await until(lambda: "cannot be prepared" in caplog.text)
        for number in range(2):
            answer = (await collect(engine, prompt(number, 9)))[0]
            assert answer.token_ids == answer_to(prompt(number, 9), len(answer.token_ids))
        await engine.close()
        assert caplog.text.count("cannot be prepared") == 1

    run(main())
