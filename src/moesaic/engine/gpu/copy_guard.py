"""How many experts may be copied to the cache, so that decode steps together take hardly longer for it.

Steps during which nothing is copied say what a step takes. What others take more is what copies cost: reads of the same
memory, a busy link, launches. A part of all time is credit for that; what was spent is taken off it, whatever a policy
wants and however slow the link is. This module knows neither devices nor experts.
"""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["CopyGuard"]

_SHARE = 0.015  # of all time
_SAVED_STEPS = 256  # of whose credit something can be left
_FIRST = 4  # copies of the first burst; then at most twice as many as in the last
_NEW = 0.05  # weight of the newest step among those without copies, at least
_LONG = 4  # steps that a burst may take for the next to be larger: meanwhile what is usual is not seen
_MOST = 2.0  # a step counts at most so many times the usual: it may have waited for something else
_WARM_UP = 2  # first steps of a bucket that say nothing
_KEPT = 0.9  # of what earlier bursts say of the cost of a copy, at every burst
_FORGET = 0.95  # of that cost at every question that it was the reason to refuse


class CopyGuard:
    """Credit for copies, in seconds of decode steps.

    Args:
        share: of all time, what copies may cost.
    """

    def __init__(self, share: float = _SHARE) -> None:
        self._share = share
        self._clean: dict[Hashable, tuple[float, int]] = {}  # mean of steps without copies, and how many there were
        self._steps: dict[Hashable, int] = {}
        self._credit = 0.0
        self._most = 0.0
        self._burst, self._lasted, self._excess, self._largest = 0, 0, 0.0, _FIRST // 2
        self._copies, self._spent = 0.0, 0.0  # of bursts so far, the latest counting most

    @property
    def cost(self) -> float:
        """Seconds that steps take longer for a copy, as far as is known."""
        return max(0.0, self._spent / self._copies) if self._copies else 0.0

    def begin(self, copies: int) -> None:
        """So many copies begin."""
        self._burst += copies

    def observe(self, bucket: Hashable, seconds: float, is_busy: bool) -> None:
        """A step is over.

        Args:
            bucket: steps of the same one take about the same time.
            seconds: that it took.
            is_busy: whether something was copied during it.
        """
        self._steps[bucket] = count = self._steps.get(bucket, 0) + 1
        if count <= _WARM_UP:
            return
        clean, seen = self._clean.get(bucket, (seconds, 0))
        if seen == 0 and is_busy:
            return
        seconds = min(seconds, _MOST * clean)
        self._most = self._share * clean * _SAVED_STEPS
        self._earn(self._share * clean)
        if is_busy:
            self._excess += seconds - clean
            self._lasted += 1
            self._earn(clean - seconds)
        else:
            self._clean[bucket] = clean + max(_NEW, 1 / (seen + 1)) * (seconds - clean), seen + 1

    def end(self) -> None:
        """All copies that had begun are complete."""
        if self._burst == 0:
            return
        self._copies = _KEPT * self._copies + self._burst
        self._spent = _KEPT * self._spent + self._excess
        self._largest = max(self._burst * _LONG // max(_LONG, 2 * self._lasted), _FIRST // 2)
        self._burst, self._lasted, self._excess = 0, 0, 0.0

    def spend(self, seconds: float) -> None:
        """A question to the policy took so long."""
        self._earn(-seconds)

    def allowance(self) -> int:
        """Copies that may begin now."""
        if self._credit <= 0.0 or not self._clean:
            return 0
        most, cost = 2 * self._largest, self.cost
        if cost * most <= self._credit:
            return most
        allowed = int(self._credit / cost)
        if allowed == 0:
            self._spent *= _FORGET
        return allowed

    def _earn(self, seconds: float) -> None:
        self._credit = max(-self._most, min(self._most, self._credit + seconds))
