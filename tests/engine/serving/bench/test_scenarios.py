"""A long prompt beside others, and known beginnings, on a target that answers in known times."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from moesaic.engine.serving.bench.drive import Piece
from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.engine.serving.bench.scenarios import Fairness, Prefix, measure_fairness, measure_prefix
from moesaic.errors import MoesaicError

LONG = 1000
QUICK, SLOW = 0.02, 0.1


class Turns:
    """A token every 20 ms, every 100 ms while somebody has a long prompt; that takes half a second."""

    def __init__(self, fail_long: bool = False) -> None:
        self.step, self.fail_long = QUICK, fail_long
        self.seen: set[tuple[int, ...]] = set()
        self.open = 0

    async def ask(self, request: BenchRequest) -> AsyncIterator[Piece]:
        self.open += 1
        try:
            if len(request.prompt_ids) >= LONG:
                async for piece in self._long(request):
                    yield piece
                return
            for number in range(request.num_tokens):
                await asyncio.sleep(self.step)
                yield Piece(1, (number,))
        finally:
            self.open -= 1

    async def _long(self, request: BenchRequest) -> AsyncIterator[Piece]:
        if self.fail_long:
            raise MoesaicError("too long")
        beginning = request.prompt_ids[: LONG - 50]
        known, self.step = beginning in self.seen, SLOW
        self.seen.add(beginning)
        await asyncio.sleep(0.05 if known else 0.5)
        self.step = QUICK
        yield Piece(1, (1,), cached_tokens=LONG - 50 if known else 0)


def test_times_between_tokens_without_and_with_a_long_prompt() -> None:
    target = Turns()
    fair = asyncio.run(
        measure_fairness(target, 10**6, users=3, prompt=5, answer=9, long_prompt=LONG, seconds_alone=0.6)
    )
    assert target.open == 0  # all who decoded have been told to stop
    assert 18 < fair.before_p50 < 60
    assert 95 < fair.during_max < 400
    assert fair.during_max > fair.before_p50 * 1.5
    assert fair.prompt_seconds == pytest.approx(0.5, abs=0.3)
    assert fair.ratio_max == fair.during_max / fair.before_p50
    assert min(fair.gaps) >= 3


def test_a_long_prompt_that_fails_is_no_result() -> None:
    target = Turns(fail_long=True)
    with pytest.raises(MoesaicError, match="a prompt of 1000 tokens failed: too long"):
        asyncio.run(measure_fairness(target, 10**6, users=2, prompt=5, answer=9, long_prompt=LONG, seconds_alone=0.1))
    assert target.open == 0


def test_known_beginnings() -> None:
    prefix = asyncio.run(measure_prefix(Turns(), 10**6, shared=LONG - 50, own=50, pairs=2))
    assert (prefix.prompt_tokens, prefix.shared_tokens, prefix.cached_tokens, prefix.pairs) == (1000, 950, 950, 2)
    assert prefix.first > 450 and 45 < prefix.second < 400
    assert prefix.ratio == prefix.second / prefix.first


def test_ratios() -> None:
    fair = Fairness(4, 100, 1.0, 10.0, 12.0, 13.0, 20.0, 24.0, 45.0, (5, 5))
    assert (fair.ratio_p99, fair.ratio_max) == (2.4, 4.5)
    assert Prefix(10, 8, 8, 100.0, 9.0, 1).ratio == 0.09
