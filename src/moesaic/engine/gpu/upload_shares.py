"""What share of a layer's misses decode steps bring to the GPU: the one with which steps were quickest.

Nobody knows beforehand what the link, the CPU and the memory that both read do to each other, so shares are tried: a
few steps with another share in turns with as many of the usual one, and the medians decide. What steps of trials take
more than usual is paid from a credit, a small part of all time; a trial that goes badly ends at once. Each number of
sequences has a share of its own. When steps become much slower or quicker, what was known of other shares is forgotten.
This module knows neither devices nor experts.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass, field

__all__ = ["ALL", "UploadShares", "expected_share", "numbers_of"]

ALL = 8
"""Shares are eighths: this is all misses."""

_CREDIT = 0.01  # of all time, what trials may cost
_GRANT = 1.0  # usual steps, what the first trials of a batch may cost
_SAVED = 8.0  # usual steps of which credit can be left
_WARM_UP = 2  # first steps without uploads, and with, that say nothing
_READY = 6  # steps that are known before something else is tried
_NEW = 0.1  # weight of the newest step, at least
_MOST = 2.0  # a step counts at most so many times the usual
_TURN = 2  # steps of a trial, then as many of the usual share
_FEW, _MANY = 4, 16  # steps of a trial before it can be decided, and by which it must
_GAIN = 0.01  # of a step, what a share must be quicker to be taken
_CLEAR = 0.7  # of the usual: after a turn of this, no more is needed
_BAD, _AWFUL = 1.15, 2.0  # times the usual: after a turn of this, and after a first step, a trial is over
_GUESS = 1.2  # times the usual: what an unknown share is expected to take at worst
_AT_ONCE, _SOON, _LATE = 8, 64, 1024  # steps before something is tried again
_PART = 0.5  # of the credit, what trying a share that was slower may take
_DRIFT = 1.15  # times what steps took after the last trial: other shares are to be tried anew


def numbers_of(share: int, max_distinct: int, num_slots: int) -> list[int]:
    """How many experts are brought if 0, 1, ... `max_distinct` are missing: so many eighths of them, rounded."""
    return list(_numbers_of(share, max_distinct, num_slots))


@functools.cache
def _numbers_of(share: int, max_distinct: int, num_slots: int) -> tuple[int, ...]:
    """The same, once: every step asks, and while it is found the GPU has nothing to do."""
    return tuple(min(num_slots, (2 * share * missing + ALL) // (2 * ALL)) for missing in range(max_distinct + 1))


def expected_share(top_k: int, per_upload: float, per_expert: float, fixed: float = 0.0) -> int:
    """The share with which link and CPU would end together, or nearly, if they did not disturb each other.

    Args:
        top_k: experts that are missing.
        per_upload: seconds of one on the link.
        per_expert: seconds of one on the CPU.
        fixed: seconds that the CPU needs to begin.

    Returns:
        Eighths; 0 if not even one expert would come in less time than the CPU takes for all.
    """

    def seconds(share: int) -> float:
        number = numbers_of(share, top_k, top_k)[top_k]
        rest = top_k - number
        return max(number * per_upload, fixed + rest * per_expert if rest else 0.0)

    best = min(range(ALL + 1), key=seconds)
    return best if seconds(best) <= (1.0 - _GAIN) * seconds(0) else 0


@dataclass(slots=True)
class _Trial:
    """Steps with another share in turns with the usual one."""

    share: int
    own: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    taken: int = 0
    spent: float = 0.0

    @property
    def is_own_turn(self) -> bool:
        return self.taken // _TURN % 2 == 0


@dataclass(slots=True)
class _Batch:
    """What is known of steps of so many sequences."""

    share: int
    seconds: dict[int, float] = field(default_factory=dict)  # of a step, by share
    tried: dict[int, int] = field(default_factory=dict)  # when a share was tried last
    warm: list[int] = field(default_factory=lambda: [0, 0])  # steps without uploads and with that were seen
    known: int = 0  # steps with this share since it is the usual one, or since what was known was forgotten
    steps: int = 0
    noise: float = 0.05  # of a step
    reference: float = 0.0  # what steps took after the last trial
    direction: int = 1
    wait: int = _SOON
    last: int = 0  # when the last trial ended
    trial: _Trial | None = None

    def usual(self) -> float:
        return self.seconds.get(self.share, 0.0)

    def seems_quicker(self, share: int) -> bool:
        return self.seconds[share] < (1.0 - _GAIN) * self.usual()

    def may_be_tried_again(self, share: int) -> bool:
        excess = self.seconds[share] / self.usual() - 1.0
        wait = _AT_ONCE if self.seems_quicker(share) else self.wait
        return self.steps - self.last >= wait and self.steps - self.tried.get(share, 0) >= _TURN * excess / (
            _PART * _CREDIT
        )


class UploadShares:
    """Shares, by the number of sequences in a step.

    Args:
        expected: the share that is tried first (see `expected_share`); 0: the smallest.
    """

    def __init__(self, expected: int = 0) -> None:
        self._expected = expected
        self._batches: dict[int, _Batch] = {}
        self._credit = 0.0
        self._running = (0, 0, False)  # of the step that has begun: batch, share, whether it belongs to a trial

    def usual(self, batch: int) -> int:
        """The share that steps of so many sequences have when nothing is tried."""
        return self._batch(batch).share

    def is_settled(self, batch: int) -> bool:
        """Whether nothing is left to try but what is repeated now and then, in case something has changed.

        That is: no trial is running; the usual share, its neighbours, no uploads and what was expected were seen since
        steps began to take what they take; and nothing that would be tried again seemed quicker.
        """
        known = self._batches.get(batch)
        if known is None or known.trial is not None or known.known < _READY:
            return False
        is_known = all(each in known.seconds for each in self._candidates(known))
        return is_known and not any(known.seems_quicker(each) for each in self._repeated(known))

    def begin(self, batch: int, is_quiet: bool = True) -> int:
        """The share of the step that begins now.

        Args:
            batch: sequences of it.
            is_quiet: whether nothing else is known to make it longer, such as copies; otherwise nothing is tried.
        """
        known = self._batch(batch)
        if is_quiet and known.trial is None:
            known.trial = self._next_trial(known)
        trial = known.trial if is_quiet else None
        share = trial.share if trial is not None and trial.is_own_turn else known.share
        if trial is not None and share > 0 and known.warm[1] < _WARM_UP:
            share = 1  # whatever is wrong with uploads, it costs least so
        self._running = (batch, share, trial is not None)
        return share

    def observe(self, seconds: float, is_quiet: bool = True) -> None:
        """The step that had begun is over; it took so long."""
        batch, share, is_trial = self._running
        known = self._batch(batch)
        known.steps += 1
        usual = known.usual()
        self._earn(_CREDIT * usual, usual)
        known.warm[share > 0] += 1
        is_first = known.warm[share > 0] <= _WARM_UP
        if is_trial and known.trial is not None and share != known.share:
            known.trial.spent += seconds - usual
            self._earn(-max(0.0, seconds - usual), usual)
        if is_trial and known.trial is not None and is_first and seconds >= _AWFUL * usual:
            known.trial.own.append(seconds)
            self._end(known, known.trial, False)
        if not is_quiet or is_first:
            return
        if share == known.share:
            self._note(known, seconds)
        if is_trial and known.trial is not None:
            known.trial.taken += 1
            (known.trial.usual if share == known.share else known.trial.own).append(min(seconds, _MOST * usual))
            self._judge(known, known.trial, usual)

    def _batch(self, batch: int) -> _Batch:
        if batch not in self._batches:
            nearest = min(self._batches, key=lambda other: abs(other - batch), default=None)
            self._batches[batch] = _Batch(0 if nearest is None else self._batches[nearest].share)
        return self._batches[batch]

    def _note(self, known: _Batch, seconds: float) -> None:
        """A step with the usual share."""
        before = known.usual()
        if not before:
            known.seconds[known.share] = known.reference = seconds
            self._credit += _GRANT * seconds
        else:
            seconds = min(seconds, _MOST * before)
            weight = max(_NEW, 1 / (known.known + 1))
            known.seconds[known.share] = now = before + weight * (seconds - before)
            known.noise += _NEW * (min(0.2, 1.25 * abs(seconds - before) / before) - known.noise)
            if known.known < _READY:
                known.reference = now
            elif known.trial is None and not 1 / _DRIFT < now / known.reference < _DRIFT:
                self._forget(known)
        known.known += 1

    def _forget(self, known: _Batch) -> None:
        """Steps take another time than before: what others take is not known any more."""
        known.seconds = {known.share: known.usual()}
        known.reference, known.wait, known.known = known.usual(), _SOON, 0

    def _next_trial(self, known: _Batch) -> _Trial | None:
        if known.known < _READY:
            return None
        share = self._candidate(known)
        if share is None:
            return None
        usual = known.usual()
        excess = max(0.0, known.seconds.get(share, _GUESS * usual) - usual)
        return _Trial(share) if excess * _FEW <= self._credit else None

    def _candidate(self, known: _Batch) -> int | None:
        """The share to try next: one that is not known, or one that may have become better."""
        candidates = self._candidates(known)
        for each in candidates:
            if each not in known.seconds:
                return each
        again = [each for each in self._repeated(known) if known.may_be_tried_again(each)]
        return min(again, key=lambda each: known.tried.get(each, 0), default=None)

    def _candidates(self, known: _Batch) -> list[int]:
        """Shares to be known beside the usual one, which may be among them, in the order in which they are tried."""
        near = self._neighbours(known)
        return [0, self._expected or near[0], *near]

    def _repeated(self, known: _Batch) -> list[int]:
        """Shares that are tried again, now and then."""
        return [each for each in dict.fromkeys((*self._neighbours(known), 0)) if each != known.share]

    @staticmethod
    def _neighbours(known: _Batch) -> list[int]:
        share, step = known.share, known.direction
        return [each for each in (share + step, share - step) if 0 <= each <= ALL]

    def _judge(self, known: _Batch, trial: _Trial, usual: float) -> None:
        """End a trial when it is clear enough who is quicker."""
        own, other = trial.own, trial.usual
        if min(own, default=0.0) >= (_AWFUL if len(own) < _TURN else _BAD) * usual:
            self._end(known, trial, False)
        elif len(own) >= _TURN and len(other) >= _TURN and max(own) <= _CLEAR * min(other):
            self._end(known, trial, True)
        elif trial.taken % (2 * _TURN) == 0 and len(own) >= _FEW:
            gain = statistics.median(other) - statistics.median(own)
            error = 1.25 * math.sqrt(2 / len(own)) * max(known.noise, 0.002) * usual
            if gain - 2 * error > _GAIN * usual:
                self._end(known, trial, True)
            elif gain <= 0.0 or len(own) >= _MANY:
                self._end(known, trial, gain > _GAIN * usual)
        elif trial.spent > 0 and self._credit < 0 and len(own) >= _TURN:
            self._end(known, trial, False)

    def _end(self, known: _Batch, trial: _Trial, is_better: bool) -> None:
        known.trial, known.last = None, known.steps
        if is_better and trial.share in known.seconds:  # which it was not before
            known.seconds = {known.share: known.usual()}
        known.seconds[trial.share] = statistics.median(trial.own)
        known.tried[trial.share] = known.steps
        if not is_better:
            known.direction = -known.direction if trial.share == known.share + known.direction else known.direction
            known.wait = min(_LATE, 2 * known.wait)
            known.reference = known.usual()
            return
        known.direction = 1 if trial.share > known.share else -1
        known.tried[known.share] = known.steps
        known.share, known.wait, known.known = trial.share, _SOON, 0
        known.reference = known.usual()

    def _earn(self, seconds: float, usual: float) -> None:
        self._credit = min(_SAVED * usual, self._credit + seconds) if usual else self._credit
