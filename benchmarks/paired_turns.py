"""Whether a way to decode is slower than another by more than was promised, on a computer whose speed changes.

A turn is some steps without, twice as many with, and as many without again (A B B A): what changes slowly falls on
both alike, and so does a step after each switch, which is not counted. Its ratio is the speed with over the speed
without. Much shorter turns than the computer's moods, and many of them, say more than a few long ones.

Two figures come of the turns. The median of their ratios does not mind single turns that something else disturbed; its
interval is that of ranks (binomial), which supposes nothing of how ratios are distributed. But a cost that few turns
pay, a burst of copies say, does not show in a median; so there is the ratio of all time, too, every turn counting
alike, with a bootstrap interval. A promise is about the cost, all of it, and is

- broken, if one of both intervals (95%) lies below it,
- kept, if the interval of the median lies at or above it, and the ratio of all time does, too,
- undecided otherwise: more turns, or a quieter computer, might tell.

Turns end when the interval of the median is narrow enough, never because the verdict is welcome. What is timed, and
what "with" means, is the caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

__all__ = [
    "LEAST_TURNS",
    "Finding",
    "Turn",
    "Verdict",
    "Ways",
    "judge",
    "median_interval",
    "take_turn",
    "take_turns",
]

Verdict = Literal["kept", "broken", "undecided"]

CONFIDENCE = 0.95
LEAST_TURNS = 8
_LATE_BLOCKS = 4  # blocks by which steps with are continued at most, until what they began is over
_RESAMPLES = 4000
_SEED = 20_251_126


class Ways(Protocol):
    """Steps that can be made with something and without."""

    def begin(self) -> None:
        """A turn is about to begin, without; not timed."""
        ...

    def switch(self, is_with: bool) -> None:
        """Go on the other way; what that costs, and the step after it, is not timed."""
        ...

    def step(self) -> float:
        """Make a step; seconds that it took."""
        ...

    def is_settled(self) -> bool:
        """Whether nothing that steps with began is still going on, and could disturb steps without."""
        ...

    def settle(self) -> float:
        """Wait until it is; seconds that it took."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of a step without and with, means over the steps of a turn."""

    without: float
    own: float

    @property
    def ratio(self) -> float:
        """Speed with over speed without."""
        return self.without / self.own


@dataclass(frozen=True, slots=True)
class Finding:
    """What turns say.

    Attributes:
        ratio, low, high: median of the turns' ratios, and its interval.
        whole, whole_low, whole_high: ratio of all time, and its interval.
        turns: how many there were.
    """

    ratio: float
    low: float
    high: float
    whole: float
    whole_low: float
    whole_high: float
    turns: int

    def verdict(self, bound: float) -> Verdict:
        """Whether the speed with is at least `bound` times that without."""
        if self.high < bound or self.whole_high < bound:
            return "broken"
        return "kept" if self.low >= bound and self.whole >= bound else "undecided"


def take_turn(ways: Ways, block: int) -> Turn:
    """A turn of twice `block` steps each way; with, some more, until what they began is over.

    Waiting for what is not over then is time of the steps with.
    """
    ways.begin()
    without = [ways.step() for _ in range(block)]
    ways.switch(True)
    own = [ways.step() for _ in range(2 * block)]
    while not ways.is_settled() and len(own) < (2 + _LATE_BLOCKS) * block:
        own.append(ways.step())
    waited = ways.settle()
    ways.switch(False)
    without += [ways.step() for _ in range(block)]
    return Turn(math.fsum(without) / len(without), (math.fsum(own) + waited) / len(own))


def take_turns(
    ways: Ways, block: int, half_width: float, seconds: float, clock: Callable[[], float] = time.monotonic
) -> list[Turn]:
    """Turns until the interval of their median is narrower than twice `half_width`, or the time is up.

    There are at least `LEAST_TURNS` of them, unless these would take more than twice the time.
    """
    turns, began = list[Turn](), clock()
    while True:
        turns.append(take_turn(ways, block))
        taken = clock() - began
        if taken > (seconds if len(turns) >= LEAST_TURNS else 2 * seconds):
            return turns
        low, high = median_interval([turn.ratio for turn in turns])
        if len(turns) >= LEAST_TURNS and (high - low) / 2 < half_width:
            return turns


def judge(turns: Sequence[Turn]) -> Finding:
    """What one or more turns say."""
    ratios = [turn.ratio for turn in turns]
    without, own = (np.array(column) for column in zip(*((turn.without, turn.own) for turn in turns), strict=True))
    whole = float(without.sum() / own.sum())
    return Finding(
        float(np.median(ratios)), *median_interval(ratios), whole, *_whole_interval(without, own), turns=len(turns)
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the median of whatever the values were drawn from lies, with at least this probability.

    From the k-th smallest to the k-th largest value: the median is below the former only if fewer than k of n values
    are below it, each with probability 1/2. Infinite where too few values allow none.
    """
    ordered, count, below = sorted(values), len(values), 0.0
    rank = 0  # the largest k with P(fewer than k of n) <= (1 - confidence) / 2
    while rank < count:
        below += math.comb(count, rank) / 2**count
        if below > (1 - confidence) / 2:
            break
        rank += 1
    return (ordered[rank - 1], ordered[-rank]) if rank else (-math.inf, math.inf)


def _whole_interval(without: np.ndarray, own: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of the sum of float64 `[turns]` over that of another one."""
    if len(own) < 2:
        return -math.inf, math.inf
    chosen = np.random.default_rng(_SEED).integers(len(own), size=(_RESAMPLES, len(own)))
    ratios = without[chosen].sum(axis=1) / own[chosen].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
