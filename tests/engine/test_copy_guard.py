"""How many copies decode steps can afford, on computers whose steps take what the tests make up."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.engine.gpu.copy_guard import CopyGuard

STEP = 0.010
EVERY = 8


class Decoding:
    """Steps with copies that a policy wants; each copy makes a step longer, and takes its time on the link.

    Args:
        cost: seconds that steps take longer for a copy.
        link: seconds of a copy on the link; those that do not fit in a step go on in the next.
        wanted: copies that the policy wants at every question.
    """

    def __init__(self, cost: float, link: float = 5e-5, wanted: int = 61, noise: float = 0.05, seed: int = 0) -> None:
        self.guard, self.random = CopyGuard(), np.random.default_rng(seed)
        self.cost, self.link, self.wanted, self.noise = cost, link, wanted, noise
        self.left = self.since = self.copies = 0
        self.leaving = 0

    def run(self, steps: int, bucket: int = 1, step: float = STEP) -> float:
        """Seconds of all steps over those of as many without copies."""
        total = bare = 0.0
        for _ in range(steps):
            clean = step * (1 + self.noise * self.random.standard_normal())
            is_busy = bool(self.left or self.leaving)
            self.guard.begin(self.leaving)
            self.left += self.leaving
            self.copies += self.leaving
            self.leaving = 0
            done = min(self.left, max(1, int(clean / self.link)))
            self.left -= done
            seconds = clean + self.cost * done
            self.guard.observe(bucket, seconds, is_busy)
            if not self.left:
                self.guard.end()
            self.since += 1
            if self.since >= EVERY and not is_busy:
                self.since = 0
                self.leaving = min(self.wanted, self.guard.allowance())
            total, bare = total + seconds, bare + clean
        return total / bare


@pytest.mark.parametrize("cost", [0.0, 1e-5, 5e-5, 2e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("link", [5e-5, 5e-4, 5e-3])
def test_copies_cost_little_of_the_time_whatever_the_policy_wants(cost: float, link: float) -> None:
    for seed in range(3):
        decoding = Decoding(cost, link, seed=seed)
        assert decoding.run(300) <= 1.03
        assert decoding.run(2000) <= 1.02


def test_copies_that_cost_nothing_are_all_allowed() -> None:
    decoding = Decoding(0.0, wanted=20, noise=0.02)
    decoding.run(300)
    before = decoding.copies
    decoding.run(2000)
    assert decoding.copies - before > 0.7 * 20 * 2000 / 9


def test_copies_that_cost_much_are_tried_again_now_and_then() -> None:
    decoding = Decoding(5e-3)
    decoding.run(2000)
    assert 0 < decoding.copies < 150
    decoding.cost = 1e-5  # nobody else uses the link any more
    decoding.run(2000)
    before = decoding.copies
    decoding.run(1000)
    assert decoding.copies - before > 1000


def test_every_bucket_has_its_own_usual_time() -> None:
    decoding = Decoding(2e-4)
    ratios = [[decoding.run(9, bucket, STEP * bucket) for bucket in (1, 8)] for _ in range(60)]
    assert np.average(ratios[10:], weights=[[1, 8]] * 50) <= 1.02
    assert decoding.copies > 100


def test_nothing_is_copied_before_a_step_is_known() -> None:
    guard = CopyGuard()
    for _ in range(2):  # the first ones may compile
        guard.observe(1, 9.0, is_busy=False)
    assert guard.allowance() == 0
    for _ in range(8):
        guard.observe(1, 0.01, is_busy=False)
    assert guard.allowance() == 4 and guard.cost == 0.0
