"""Decode steps with an expert cache and without, on one runner and one sequence: what `paired_turns` switches between.

Each way has graphs of its own. The cache sees its own steps only, as if no others were between them: the step after a
switch, which is not timed, replays its graph without its knowledge, and what was chosen without it is none of its
business.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from timed_decode import TimedDecode

__all__ = ["PROFILE_TOKENS", "CacheWays"]

PROFILE_TOKENS = 4096
WARM_UP = 24  # steps with a new cache that do not count


class CacheWays:
    """Decode steps with and without a cache on one runner: `Ways`.

    Args:
        runner: of a loaded model; its slots are replaced.

    Attributes:
        cache: that steps with it have.
        copied, steps: experts that were copied in steps with it, and these steps, since `restart_counts`.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.decode = runner, TimedDecode(runner)
        self.cache: ExpertCache | None = None
        self._none, self._none_buckets = ExpertSlots(), dict[int, Any]()
        self._slots, self._buckets = self._none, dict[int, Any]()
        self._is_with = False
        self._unseen: np.ndarray | None = None  # uses in steps with the cache that it was not asked about yet
        self.restart_counts()
        self._enter()

    def set_cache(
        self, num_slots: int, policy: PromotionPolicy | None = None, profile: np.ndarray | None = None
    ) -> None:
        """A new cache, empty or with the busiest experts by a profile of `PROFILE_TOKENS` tokens, and some steps."""
        self._is_with, self.cache = False, None
        self._slots, self._buckets = self._none, {}
        self._enter()
        torch.cuda.empty_cache()
        decoder = self.runner.decoder
        self.cache = ExpertCache(decoder.routed, num_slots, decoder.device, policy)
        if profile is not None:
            self.cache.fill(profile, PROFILE_TOKENS)
        self._slots = ExpertSlots(cache=self.cache)
        self.begin()  # a graph without
        self._is_with, self._unseen = True, np.zeros_like(self._uses())
        self._enter()
        self._resume()

    def warm_up(self, steps: int = WARM_UP) -> None:
        """Steps with the cache, for its graph and for what it has to learn; then a step without."""
        for _ in range(steps):
            self.step()
        self.settle()
        self.switch(False)
        self.restart_counts()

    def restart_counts(self) -> None:
        """Count anew."""
        self.steps = 0
        if self.cache is not None:
            self._counted = self._count()

    def begin(self) -> None:
        """As `Ways`."""
        if self.decode.renew():
            self.decode.step()

    def switch(self, is_with: bool) -> None:
        """As `Ways`. The step after it is one with the cache's graph, of which the cache knows nothing."""
        if self._is_with:
            self._unseen = self._uses() - self.cache._seen
        self._is_with = is_with
        self.runner.steps.slots = self._none
        self.runner.steps.buckets = self._buckets if is_with else self._none_buckets
        self.decode.step()
        self._enter()
        if is_with:
            self._resume()

    def step(self) -> float:
        """As `Ways`."""
        self.steps += self._is_with
        return self.decode.step()

    def is_settled(self) -> bool:
        """As `Ways`."""
        return all(event is None or event.query() for _, event in self.cache._under_way)

    def settle(self) -> float:
        """As `Ways`; copies that were only decided on begin in the next step with the cache."""
        began = time.perf_counter()
        for _, event in self.cache._under_way:
            if event is not None:
                event.synchronize()
        return time.perf_counter() - began

    def counts(self) -> dict[str, Any]:
        """What the cache did since `restart_counts`."""
        hits, uses, copied = self._count() - self._counted
        return {
            "slots": self.cache.policy.num_slots,
            "held": self.cache.statistics().num_held,
            "hit_rate": int(hits) / int(uses) if uses else 0.0,
            "copies_per_token": int(copied) / max(1, self.steps),
        }

    def _count(self) -> np.ndarray:
        policy = self.cache.policy
        return np.array([policy.hits.sum(), policy.uses.sum(), self.cache.statistics().copied])

    def _uses(self) -> np.ndarray:
        return self.runner.server.uses.numpy().view(np.uint32)

    def _resume(self) -> None:
        """What was chosen without the cache is none of its business."""
        self.cache._seen[:] = self._uses() - self._unseen

    def _enter(self) -> None:
        steps = self.runner.steps
        steps.slots = self._slots if self._is_with else self._none
        steps.buckets = self._buckets if self._is_with else self._none_buckets
