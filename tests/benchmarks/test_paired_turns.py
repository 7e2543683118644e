"""Turns, their intervals and verdicts, on made-up times whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from paired_turns import LEAST_TURNS, Finding, Turn, judge, median_interval, take_turn, take_turns


class MadeUp:
    """Steps whose times a function of their number and way says; what is not timed has numbers, too."""

    def __init__(self, seconds: Callable[[int, bool], float], late: int = 0, wait: float = 0.0) -> None:
        self.seconds, self.late, self.wait = seconds, late, wait
        self.count, self.now, self.is_with, self.log = 0, 0.0, False, ""

    def begin(self) -> None:
        self.log += "["

    def switch(self, is_with: bool) -> None:
        assert is_with != self.is_with
        self.is_with = is_with
        self._advance()
        self.log += "+" if is_with else "-"

    def step(self) -> float:
        self.log += "B" if self.is_with else "A"
        return self._advance()

    def is_settled(self) -> bool:
        return len(self.log.rpartition("+")[2]) >= self.late

    def settle(self) -> float:
        return self.wait

    def clock(self) -> float:
        return self.now

    def _advance(self) -> float:
        self.count += 1
        seconds = self.seconds(self.count, self.is_with)
        self.now += seconds
        return seconds


def test_a_turn_is_abba_and_waits_for_what_it_began() -> None:
    ways = MadeUp(lambda count, is_with: 2.0 if is_with else 1.0)
    assert take_turn(ways, 3) == Turn(1.0, 2.0)
    assert ways.log == "[AAA+BBBBBB-AAA"
    ways = MadeUp(lambda count, is_with: 2.0 if is_with else 1.0, late=5)
    take_turn(ways, 2)
    assert ways.log == "[AA+BBBBB-AA"
    ways = MadeUp(lambda count, is_with: 2.0 if is_with else 1.0, late=99, wait=6.0)
    assert take_turn(ways, 1) == Turn(1.0, 2.0 + 6.0 / 6)  # six steps at most, and the wait is theirs
    assert ways.log == "[A+BBBBBB-A"


def test_what_changes_slowly_falls_on_both() -> None:
    ways = MadeUp(lambda count, is_with: (1.0 + 0.01 * count) * (1.25 if is_with else 1.0))
    assert take_turn(ways, 4).ratio == pytest.approx(0.8, rel=1e-12)


def test_the_interval_of_a_median_is_that_of_ranks() -> None:
    """Ranks as in tables of the sign test, two-sided, 5%."""
    for count, rank in ((6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (40, 14), (100, 40)):
        values = list(range(1, count + 1))
        assert median_interval([float(x) for x in values[::-1]]) == (rank, count + 1 - rank)
    assert median_interval([1.0] * 5) == (-math.inf, math.inf)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, missed, missed_whole = np.random.default_rng(0), 0, 0
    for _ in range(400):
        noise = np.exp(0.05 * rng.standard_t(3, size=(30, 2)))  # with outliers
        found = judge([Turn(0.98 * a, b) for a, b in noise])
        missed += not found.low <= 0.98 <= found.high
        missed_whole += not found.whole_low <= 0.98 <= found.whole_high
    assert 3 <= missed <= 28  # 5% of 400 are 20, and ranks are whole numbers: 4.3%
    assert missed_whole <= 40  # a bootstrap of 30 is a little too narrow


def verdict(ratios: list[float], bound: float = 0.97) -> str:
    return judge([Turn(ratio, 1.0) for ratio in ratios]).verdict(bound)


def test_verdicts() -> None:
    around = [-0.004, -0.002, 0.0, 0.002, 0.004] * 6
    assert verdict([1.0 + each for each in around]) == "kept"
    assert verdict([0.98 + each for each in around]) == "kept"
    assert verdict([0.97 + each for each in around]) == "undecided"
    assert verdict([0.95 + each for each in around]) == "broken"
    assert verdict([0.99 + 30 * each for each in around]) == "undecided"  # too noisy
    assert verdict([1.0] * 3) == "undecided"  # too few


def test_a_cost_that_few_turns_pay_is_seen() -> None:
    """Most turns are as fast as without, and one in five takes half as long again: 9% of all time."""
    turns = [Turn(1.0, 1.5 if index % 5 == 0 else 1.0) for index in range(60)]
    found = judge(turns)
    assert found.ratio == found.low == found.high == 1.0
    assert found.whole == pytest.approx(1 / 1.1)
    assert found.verdict(0.97) == "broken"
    unclear = Finding(1.0, 0.99, 1.01, 0.965, 0.95, 0.98, 60)
    assert unclear.verdict(0.97) == "undecided"


def test_turns_end_when_they_are_precise_or_the_time_is_up() -> None:
    rng = np.random.default_rng(1)
    noisy = MadeUp(lambda count, is_with: float(np.exp(0.05 * rng.normal())))
    turns = take_turns(noisy, 2, 0.01, 1e9, noisy.clock)
    low, high = median_interval([turn.ratio for turn in turns])
    assert LEAST_TURNS < len(turns) < 300 and (high - low) / 2 < 0.01
    before, after = (median_interval([turn.ratio for turn in turns[:count]]) for count in (LEAST_TURNS, -1))
    assert before[1] - before[0] > 0.02 and after[1] - after[0] >= 0.02
    quiet = MadeUp(lambda count, is_with: 1.0)
    assert len(take_turns(quiet, 2, 0.01, 1e9, quiet.clock)) == LEAST_TURNS
    noisy.now = 0.0
    assert len(take_turns(noisy, 2, 1e-6, 200.0, noisy.clock)) in range(18, 24)  # of 10 steps, a second each
    slow = MadeUp(lambda count, is_with: 10.0)
    assert len(take_turns(slow, 2, 1e-6, 100.0, slow.clock)) == 3  # 200 s were over
