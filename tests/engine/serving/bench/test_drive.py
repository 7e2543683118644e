"""Open and closed loops against a target that answers at known times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.engine.serving.fake_runner import FakeRunner, answer_to, prompt

from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.bench.drive import EngineTarget, Piece, run_closed, run_open
from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.errors import MoesaicError

STEP = 0.03


class SlowTarget:
    """A token each step; counts who is being answered. Prompts that begin with 0 fail, with 1 are not answered."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.order: list[int] = []

    async def ask(self, request: BenchRequest) -> AsyncIterator[Piece]:
        self.order.append(request.prompt_ids[0])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if request.prompt_ids[0] == 0:
                raise MoesaicError("refused")
            for number in range(request.num_tokens if request.prompt_ids[0] != 1 else 0):
                await asyncio.sleep(STEP)
                yield Piece(1, (number,))
            yield Piece(0, (), cached_tokens=5, generated_tokens=77)
        finally:
            self.running -= 1


def requests(count: int, tokens: int = 2) -> list[BenchRequest]:
    return [BenchRequest((10 + number, 1), tokens) for number in range(count)]


def test_users_ask_again_when_they_have_their_answer() -> None:
    target = SlowTarget()
    records = asyncio.run(run_closed(target, requests(6), 2))
    assert target.most == 2 and sorted(target.order) == list(range(10, 16))
    assert [record.user for record in records] == [0, 0, 0, 1, 1, 1]
    assert target.order[0::2] == [10, 12, 14]
    for record in records:
        assert len(record.times) == 2 and record.asked < record.times[0] < record.times[1] <= record.ended
        assert (record.token_ids, record.counts, record.cached_tokens) == ([0, 1], [1, 1], 5)
        assert record.generated_tokens == 77  # what the target says counts more than pieces
    assert records[1].asked >= records[0].ended


def test_an_open_loop_does_not_wait() -> None:
    target = SlowTarget()
    records = asyncio.run(run_open(target, requests(4, 4), [0.0, 0.01, 0.02, 0.03]))
    assert target.most == 4
    asked = [record.asked - records[0].asked for record in records]
    assert asked == pytest.approx([0.0, 0.01, 0.02, 0.03], abs=1e-6)  # the times at which they were to be sent
    assert all(record.times[0] - record.asked >= 0.9 * STEP for record in records)


def test_failures_are_noted() -> None:
    asked = [BenchRequest((0,), 2), BenchRequest((1,), 2), BenchRequest((5,), 2)]
    records = asyncio.run(run_open(SlowTarget(), asked, [0.0, 0.0, 0.0]))
    assert [record.error for record in records] == ["refused", "the answer was empty", None]
    assert all(record.ended > 0 for record in records)


def test_an_engine_answers_as_many_tokens_as_asked_for() -> None:
    async def main() -> None:
        engine = AsyncEngine(lambda: Engine(FakeRunner(), None, GenerationDefaults({"do_sample": False})))
        engine.start()
        await engine.wait_ready()
        ids = prompt(1, 9)
        asked = [BenchRequest(tuple(ids), 7), BenchRequest((1,) * 10_000, 5)]
        first, second = await run_closed(EngineTarget(engine), asked, 2)
        assert first.token_ids == answer_to(ids, 7) and first.counts == [1] * 7
        assert (first.prompt_tokens, first.generated_tokens, first.cached_tokens) == (9, 7, 0)
        assert second.error is not None and "context" in second.error
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))
