"""How long decode warms up, with runs, uploads and caches that do what the tests say."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, eager_cache, on_gpu

from moesaic.engine.gpu.warm_up import CacheWatch, warm_up

RUN = 10
STEP = 0.5  # seconds


class Uploads:
    """Settled from a step on."""

    def __init__(self, bench: Bench, since: int) -> None:
        self._bench, self._since = bench, since

    def is_settled(self, batch: int) -> bool:
        assert batch == self._bench.batch
        return self._bench.steps >= self._since


class Bench:
    """Runs of ten steps.

    Args:
        uploads: step from which on shares are settled; None: there are none.
        graphs: the same of graphs.
        ways: of steps.
    """

    def __init__(self, uploads: int | None = None, graphs: int = 0, ways: tuple[bool, ...] = (False, True)) -> None:
        self.batch, self.steps, self.prompts = 3, 0, 0
        owned = SimpleNamespace(size=lambda count: 4, has_all=lambda count: self.steps >= graphs)
        self.runner = SimpleNamespace(
            uploads=None if uploads is None else Uploads(self, uploads),
            steps=SimpleNamespace(graphs=owned, ways=lambda size: ways if size == 4 else ()),
            slots=SimpleNamespace(cache=None),
        )

    def steps_until(self, is_done: Callable[[], bool]) -> None:
        self.prompts += 1
        for _ in range(RUN):
            self.steps += 1
            if is_done():
                return

    def clock(self) -> float:
        return STEP * self.steps


def test_one_run_is_enough_where_nothing_adapts() -> None:
    bench: Any = Bench()
    done = warm_up(bench, clock=bench.clock)
    assert (done.steps, done.seconds, done.unsettled, bench.prompts) == (RUN, STEP * RUN, (), 1)


@pytest.mark.parametrize(("uploads", "graphs"), [(25, 0), (17, 25), (None, 25)])
def test_steps_go_on_until_all_has_settled(uploads: int | None, graphs: int) -> None:
    bench: Any = Bench(uploads, graphs)
    done = warm_up(bench, clock=bench.clock)
    assert (done.steps, done.seconds, done.unsettled, bench.prompts) == (25, 12.5, (), 3)


def test_nobody_waits_for_uploads_that_steps_do_not_have() -> None:
    bench: Any = Bench(uploads=1000, ways=(False,))
    assert warm_up(bench, clock=bench.clock).steps == RUN


def test_a_limit_of_steps_or_seconds_is_said() -> None:
    """Limits count what follows the first run, in which kernels are compiled."""
    bench: Any = Bench(uploads=1000, graphs=1000)
    done = warm_up(bench, most_steps=12, clock=bench.clock)
    assert (done.steps, done.unsettled) == (RUN + 12, ("upload shares", "graphs"))
    bench = Bench(uploads=1000)
    done = warm_up(bench, most_seconds=3.5, clock=bench.clock)
    assert (done.steps, done.seconds, done.unsettled) == (RUN + 7, 8.5, ("upload shares",))


class Cache:
    """Of 200 slots; 40 experts are chosen in a step."""

    def __init__(self) -> None:
        self.policy = SimpleNamespace(hits=np.zeros(2, np.int64), uses=np.zeros(2, np.int64), num_slots=200)
        self.num_taken = 0

    def steps(self, watch: CacheWatch, count: int, hits: int, taken: int) -> bool:
        """So many, each with `hits` of 40, after which `taken` slots are; whether it has settled then."""
        for _ in range(count):
            self.policy.hits += hits // 2
            self.policy.uses += 20
            self.num_taken = taken
            watch.note_step()
        return watch.is_settled


def test_a_cache_has_settled_when_it_does_not_fill_and_hits_do_not_rise() -> None:
    cache: Any = Cache()
    watch = CacheWatch(cache)
    assert not cache.steps(watch, 64, hits=10, taken=200)  # one window has none to be compared with
    assert not cache.steps(watch, 64, hits=12, taken=200)  # 5% more
    assert not cache.steps(watch, 63, hits=12, taken=200)
    assert cache.steps(watch, 1, hits=12, taken=200)
    assert cache.steps(watch, 64, hits=10, taken=200)  # other prompts
    assert not cache.steps(watch, 64, hits=14, taken=200)


def test_a_cache_that_fills_has_not_settled() -> None:
    cache: Any = Cache()
    watch = CacheWatch(cache)
    assert not any(cache.steps(watch, 64, hits=10, taken=taken) for taken in (50, 53, 56))
    assert cache.steps(watch, 64, hits=10, taken=58)  # slots for experts that nobody uses


def test_a_window_without_counts_goes_on() -> None:
    """A cache counts what was used every few steps."""
    cache: Any = Cache()
    watch = CacheWatch(cache)
    cache.steps(watch, 64, hits=10, taken=200)
    for _ in range(100):
        watch.note_step()
    assert not watch.is_settled
    assert cache.steps(watch, 1, hits=10, taken=200)


def test_slots_that_wait_for_their_copies_are_not_taken() -> None:
    """A cache that got slots back fills them in the next steps, a few in each."""
    cache = on_gpu("qwen3_moe", ON_GPU, slots=eager_cache).runner.slots.cache
    assert cache.num_taken == 0
    cache.fill()
    assert cache.num_taken == 5
    cache.resize(2)
    assert cache.num_taken == 2
    cache.resize(5)
    assert cache.num_taken == 2
    cache.before_step()
    cache.during_step()
    assert cache.num_taken == 5
