"""Decodes until what adapts has settled, so that runs after it measure what steps take from then on.

Upload shares are settled when what is worth trying was tried; graphs when the size of the steps has its own; the cache
of experts when its slots do not fill any more and its hits do not rise. Whatever does not settle ends with a limit of
steps or of seconds, and is named. It knows runs, and neither files nor plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.timed_runs import GpuTimedRuns

__all__ = ["MOST_SECONDS", "MOST_STEPS", "CacheWatch", "WarmUp", "warm_up"]

MOST_STEPS = 4096
"""After the first run; a trial of uploads that went badly is paid back in some hundred steps."""

MOST_SECONDS = 20.0
"""After the first run."""

_WINDOW = 64  # steps: prompts differ in their hits, and a step's are few
_RISE = 0.02  # of all choices: what hits may rise from one window to the next
_FILLED = 0.01  # of the slots: what may be filled in a window


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What was decoded before the runs that count.

    Attributes:
        steps: decode steps.
        seconds: with the prompts, kernels that had to be compiled and graphs that had to be captured.
        unsettled: what had not settled when a limit was reached: "upload shares", "graphs", "expert cache".
    """

    steps: int
    seconds: float
    unsettled: tuple[str, ...] = ()


class CacheWatch:
    """Whether a cache of experts still changes much: windows of steps are compared.

    Args:
        cache: that is used.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache
        self._steps = 0
        self._hits, self._uses, self._taken = self._look()
        self._rate: float | None = None  # of hits in the last window
        self.is_settled = False

    def note_step(self) -> None:
        """A step is over."""
        self._steps += 1
        if self._steps < _WINDOW:
            return
        hits, uses, taken = self._look()
        if uses == self._uses:  # the cache counts every few steps
            return
        rate, filled = (hits - self._hits) / (uses - self._uses), taken - self._taken
        is_filled = filled <= _FILLED * self._cache.policy.num_slots
        self.is_settled = self._rate is not None and rate - self._rate <= _RISE and is_filled
        self._steps, self._hits, self._uses, self._taken, self._rate = 0, hits, uses, taken, rate

    def _look(self) -> tuple[int, int, int]:
        policy = self._cache.policy
        return int(policy.hits.sum()), int(policy.uses.sum()), self._cache.num_taken


class _Settling:
    """What adapts in decode steps of so many sequences."""

    def __init__(self, runner: ModelRunner, batch: int) -> None:
        self._runner, self._batch = runner, batch
        cache = runner.slots.cache
        self._watch = None if cache is None else CacheWatch(cache)
        self.steps = 0

    def note_step(self) -> None:
        """A step is over."""
        self.steps += 1
        if self._watch is not None:
            self._watch.note_step()

    def note_and_go_on(self) -> bool:
        """The same, of a run that is to be whole."""
        self.note_step()
        return False

    def unsettled(self) -> tuple[str, ...]:
        """As in `WarmUp`."""
        steps, uploads = self._runner.steps, self._runner.uploads
        found = []
        if uploads is not None and True in steps.ways(steps.graphs.size(self._batch)):
            found += [] if uploads.is_settled(self._batch) else ["upload shares"]
        found += [] if steps.graphs.has_all(self._batch) else ["graphs"]
        return (*found, *([] if self._watch is None or self._watch.is_settled else ["expert cache"]))


def warm_up(
    bench: GpuTimedRuns,
    most_steps: int = MOST_STEPS,
    most_seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> WarmUp:
    """A run of decode, however long it takes, and then more until what adapts has settled.

    Args:
        bench: of decode; prompts and lengths are those of its runs.
        most_steps: after the first run.
        most_seconds: after the first run, about: a step or a prompt that has begun is ended.
        clock: seconds from any start.
    """
    settling, began = _Settling(bench.runner, bench.batch), clock()
    bench.steps_until(settling.note_and_go_on)
    last, ends = settling.steps + most_steps, clock() + most_seconds

    def is_enough() -> bool:
        return not settling.unsettled() or settling.steps >= last or clock() >= ends

    def is_last_step() -> bool:
        settling.note_step()
        return is_enough()

    while not is_enough():
        bench.steps_until(is_last_step)
    return WarmUp(settling.steps, clock() - began, settling.unsettled())
