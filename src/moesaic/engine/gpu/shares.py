"""Which experts of a chunk the GPU computes and which the CPU does: from the times of what was done.

An expert costs the GPU what its bytes take on the way, however many tokens chose it. It costs the CPU a read of its
bytes and so much for each token; beginning at all and bringing the answer costs it something too. So the experts with
the most tokens are the GPU's, as many as let both end together. Costs are measured at the start; two follow the run:
how fast the link is, and how fast the CPU. No model knows everything, though: what a layer took in all is measured too,
where the GPU got all experts, or none, or its share, and what was quickest is what is done. This module knows neither
memory nor devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

__all__ = ["Costs", "ExpertShares", "Split"]

Split = Literal["cpu", "gpu", "both"]
"""Who gets a layer's experts, but for those that are on the GPU already."""

_NEW = 0.4  # weight of the newest observation
_MOST = 2.0  # an observation counts at most so many times what was expected: it may have waited for a compiler
_FORGET = 0.004  # of what a cost exceeds its start by, per layer in which nothing was seen of it
_SLACK = 1.3  # what is expected to take so many times the best is not tried
_SURPRISE = 0.75  # unless it is expected to take less than this of what the best has shown to take
_GAIN = 0.9  # of what one of them takes alone, what both may take for it to be worth while
_CAUTION = 0.25  # of what the CPU is expected to be able to do, what it gets until it has shown it
_TRIAL = 4  # layers of a trial; the first of them shares its time with what was done before
_TRIAL_EVERY = 96  # layers
_PATIENCE = 4  # times as long until what was slow is tried the next time
_AHEAD = 0.7  # of a share that may change
_OLD = 0.25  # of what was seen of a layer's experts before, what still counts
_EXPECT_EVERY = 8  # layers
_BUSY = 0.5  # of the mean number of tokens, what a busy expert has


@dataclass(slots=True)
class Costs:
    """Seconds that things take.

    Attributes:
        per_upload: to bring one expert to the GPU.
        fixed: for the CPU to begin.
        per_row: for each token of the chunk, to bring what the CPU gives.
        per_read: to read one expert on the CPU.
        per_token: for one token and one expert on the CPU.
        cpu_factor: that the CPU takes of what these say.
    """

    per_upload: float
    fixed: float
    per_row: float
    per_read: float
    per_token: float
    cpu_factor: float = 1.0

    def on_cpu(self, experts: np.ndarray | int, tokens: np.ndarray | int) -> np.ndarray:
        """Seconds that the CPU is expected to compute; nothing for no experts."""
        busy = self.fixed + self.per_read * np.asarray(experts) + self.per_token * np.asarray(tokens)
        return np.asarray(np.where(np.asarray(experts) > 0, self.cpu_factor * busy, 0.0))


@dataclass(slots=True)
class _Record:
    """What layers took, with about as many tokens, by who got their experts."""

    seconds: dict[Split, float] = field(default_factory=dict)
    times: dict[Split, int] = field(default_factory=dict)
    upcoming: Split | None = None  # of the next layer
    last: Split | None = None
    expected: dict[Split, float] = field(default_factory=dict)
    age: int = 0  # layers since that was expected
    left: int = 0  # layers of the trial that is going on
    since: int = 0  # layers since the last one
    waits: dict[Split, tuple[int, int]] = field(default_factory=dict)  # questions until what was slow is tried again

    def take(self) -> Split:
        """Who gets this layer's experts; chooses who will get the next's."""
        split = self.upcoming if self.upcoming in self.expected else self._pick(self.upcoming)
        self.upcoming = self._pick(split)
        return split

    def _pick(self, current: Split | None) -> Split:
        if self.left > 0 and current is not None and current in self.expected:
            self.left -= 1
            return current
        known = {split: self.seconds[split] for split in self.expected if split in self.seconds}
        # What is known may be slower than it was expected to be, and then something else may be the best.
        limit = max(_SLACK * min(self.expected.values()), _SURPRISE * min(known.values(), default=0.0))
        likely = [split for split, seconds in self.expected.items() if seconds <= limit]
        unknown = [split for split in likely if split not in known]
        self.since += 1
        if unknown:
            return self._try(min(unknown, key=lambda split: (split != "gpu", self.expected[split])))
        best = min(known, key=lambda split: known[split])
        if self.since >= _TRIAL_EVERY:
            self.since = 0
            for split in likely:
                if split != best and (known[split] <= _SLACK * known[best] or self._is_due(split)):
                    return self._try(split)
        return best

    def _is_due(self, split: Split) -> bool:
        """Whether to forget that something expected to be quick was slow, which may have had a reason that is gone.

        It is asked once in a while, and says so after four times as many questions each time.
        """
        left, every = self.waits.get(split, (1, 1))
        if left > 1:
            self.waits[split] = left - 1, every
            return False
        self.waits[split] = _PATIENCE * every, _PATIENCE * every
        self.seconds.pop(split), self.times.pop(split)
        return True

    def _try(self, split: Split) -> Split:
        self.left, self.since = _TRIAL - 1, 0
        return split

    def observe(self, split: Split, seconds: float) -> None:
        """Take note of a layer; of the first few the quickest counts, or one that waited for a compiler would."""
        known, count = self.seconds.get(split, seconds), self.times.get(split, 0)
        self.times[split] = count + 1
        if count < _TRIAL:
            self.seconds[split] = min(known, seconds)
        else:
            self.seconds[split] = known + _NEW * (min(seconds, _MOST * known) - known)


class ExpertShares:
    """Shares of a layer's experts.

    Args:
        costs: what to begin with; changed in place by observations.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs, self._start = costs, replace(costs)
        self._seen: dict[int, np.ndarray] = {}
        self._records: dict[int, _Record] = {}
        self._last: tuple[int, Split, bool] | None = None  # record, what was chosen, and whether it was before too
        self._ahead = (0, 0.0)  # tokens of a chunk, and what part of the next layer's experts will be streamed at least
        self._trust = _CAUTION  # in what the CPU is expected to take: so much of it does it get at first

    def choose(
        self, layer: int, tokens: np.ndarray, num_rows: int, present: np.ndarray | None = None, under_way: int = 0
    ) -> np.ndarray:
        """The experts that the GPU gets.

        Args:
            layer: whose they are.
            tokens: `[num_experts]`, how many tokens chose each.
            num_rows: tokens of the chunk.
            present: bool `[num_experts]`, some of these that are on the GPU or on their way.
            under_way: how many are on their way.

        Returns:
            bool `[num_experts]`; of experts that tokens chose, those present are among them.
        """
        seen = self._seen.get(layer)
        self._seen[layer] = tokens.astype(np.float64) if seen is None else tokens + _OLD * seen
        active = tokens > 0
        chosen = np.zeros(len(tokens), bool) if present is None else present & active
        num_active = int(np.count_nonzero(active))
        if num_active == 0:
            self._last, self._ahead = None, (0, 0.0)
            return chosen
        key = num_rows.bit_length()
        record = self._records.setdefault(key, _Record())
        self._expect(record, tokens, num_rows)
        split = record.take()
        if split == "gpu":
            chosen = active
        elif split == "both":
            chosen = chosen | self._part(tokens * ~chosen, num_rows, under_way)
        self._last = (key, split, split == record.last)
        record.last = split
        share = float(np.count_nonzero(chosen)) / num_active
        self._ahead = (num_rows, {"cpu": 0.0, "both": _AHEAD * share, "gpu": 1.0}[record.upcoming or split])
        self._forget(split, under_way)
        return chosen

    def asks_cpu(self, num_rows: int) -> bool:
        """Whether the CPU will probably get experts of the next layer."""
        record = self._records.get(num_rows.bit_length())
        return record is None or record.upcoming != "gpu"

    def likely(self, layer: int, num_rows: int, outside: np.ndarray, most: int) -> np.ndarray:
        """Experts of a layer, not known yet, that will be wanted on the GPU, by what was when it was last seen.

        Args:
            layer: which.
            num_rows: tokens of the chunk.
            outside: bool `[num_experts]`, those that are not on the GPU.
            most: how many.

        Returns:
            int `[n]`, ascending: neighbours among those that were busy, as far as there are enough of them.
        """
        rows, share = self._ahead
        if not rows // 2 <= num_rows <= 2 * rows:
            return np.empty(0, np.int64)
        seen = self._seen.get(layer)
        wanted = outside if seen is None else outside & (seen >= 0.5)
        count = min(most, round(share * np.count_nonzero(wanted)))
        if seen is None:
            return np.flatnonzero(wanted)[:count]
        busy = np.flatnonzero(wanted & (seen >= _BUSY * seen.sum() / max(1, np.count_nonzero(seen))))
        if len(busy) >= count:
            return busy[:count]
        best = np.flatnonzero(wanted)
        return np.sort(best[np.argsort(-seen[best], kind="stable")][:count])

    def observe_uploads(self, count: int, seconds: float) -> None:
        """`count` experts were brought to the GPU in this time."""
        if count:
            found = min(seconds / count, _MOST * self.costs.per_upload)
            self.costs.per_upload += _NEW * (found - self.costs.per_upload)

    def observe_cpu(self, num_experts: int, num_pairs: int, seconds: float) -> None:
        """The CPU computed `num_pairs` tokens of `num_experts` experts, all in all, in this time."""
        expected = float(self.costs.on_cpu(num_experts, num_pairs))
        self._trust = min(1.0, 2 * self._trust) if seconds <= _MOST * expected else _CAUTION
        # Where most of it is beginning, the time says little of the rest.
        weight = _NEW * max(0.0, 1.0 - self.costs.cpu_factor * self.costs.fixed / expected) if expected > 0 else 0.0
        self.costs.cpu_factor *= 1.0 + weight * (min(seconds / expected, _MOST) - 1.0) if weight else 1.0

    def observe_layer(self, seconds: float) -> None:
        """From the last choice to the next it took so long, attention of the next layer included."""
        if self._last is not None and self._last[2]:
            self._records[self._last[0]].observe(self._last[1], seconds)
        self._last = None

    def _expect(self, record: _Record, tokens: np.ndarray, num_rows: int) -> None:
        """What splits of a layer are expected to take, now and then: it changes little from layer to layer."""
        record.age += 1
        if record.expected and record.age < _EXPECT_EVERY:
            return
        record.age = 0
        expected = self._expected(np.sort(tokens[tokens > 0])[::-1], num_rows, 0)
        record.expected = {"cpu": float(expected[0]), "gpu": float(expected[-1])}
        least = float(expected.min())
        if least <= _GAIN * min(record.expected.values()):
            record.expected["both"] = least

    def _part(self, tokens: np.ndarray, num_rows: int, under_way: int) -> np.ndarray:
        """As many of these experts as let both end together, with care: bool, like tokens."""
        active = np.flatnonzero(tokens)
        order = active[np.argsort(-tokens[active], kind="stable")]
        expected = self._expected(tokens[order], num_rows, under_way, self._trust)
        chosen = np.zeros(len(tokens), bool)
        chosen[order[: int(np.argmin(expected))]] = True
        return chosen

    def _forget(self, split: Split, under_way: int) -> None:
        """Costs of which nothing was seen come back, slowly, to where they began."""
        costs, start = self.costs, self._start
        if split == "cpu" and under_way == 0:
            costs.per_upload -= _FORGET * max(0.0, costs.per_upload - start.per_upload)
        elif split == "gpu":
            costs.cpu_factor -= _FORGET * max(0.0, costs.cpu_factor - start.cpu_factor)
            self._trust = max(_CAUTION, self._trust * (1 - _FORGET))

    def _expected(self, tokens: np.ndarray, num_rows: int, under_way: int, trust: float = 1.0) -> np.ndarray:
        """Seconds with none of the experts on the GPU, with the first, the first two, ...: float64 `[n + 1]`."""
        costs = self.costs
        count = np.arange(len(tokens) + 1)
        rest = len(tokens) - count
        kept = int(tokens.sum()) - np.concatenate([[0], np.cumsum(tokens)])
        on_cpu = costs.on_cpu(rest, kept) / trust + np.where(rest > 0, costs.per_row * num_rows, 0.0)
        # Uploads read the same memory as the CPU does.
        reading = costs.per_read * (len(tokens) + under_way)
        return np.asarray(np.maximum(np.maximum((under_way + count) * costs.per_upload, on_cpu), reading))
