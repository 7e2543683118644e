"""Which experts of a chunk the GPU computes and which the CPU does: from the times of what was done.

An expert costs the GPU what its bytes take on the way, however many tokens chose it; it costs the CPU so much for each
token, or a read of its bytes if that takes longer. So the experts with the most tokens are the GPU's, as many as let
both end together. Costs are running averages over layers and chunks of the run itself. This module knows neither memory
nor devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Costs", "ExpertShares"]

_NEW = 0.3  # weight of the newest observation
_MOST = 2.0  # an observation counts at most so many times the average: it may have waited for a compiler
_FORGET = 0.97  # of a cost, per layer of a chunk in which nothing was seen of it: or a wrong one would stay for ever
_BUSY = 0.5  # of the mean number of tokens, what a busy expert has
_ENOUGH_PAIRS = 1024  # fewer say more about what starting to compute costs than about tokens


@dataclass(slots=True)
class Costs:
    """Seconds that things take; a start that the first layers correct.

    Attributes:
        per_upload: to bring one expert to the GPU.
        per_read: to read one expert on the CPU.
        per_token: for one token and one expert on the CPU.
    """

    per_upload: float
    per_read: float
    per_token: float


class ExpertShares:
    """Shares of a layer's experts.

    Args:
        costs: what to begin with; changed in place by observations.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._seen: dict[int, np.ndarray] = {}

    def choose(
        self, layer: int, tokens: np.ndarray, present: np.ndarray | None = None, under_way: int = 0
    ) -> np.ndarray:
        """The experts that the GPU gets.

        Args:
            layer: whose they are.
            tokens: `[num_experts]`, how many tokens chose each.
            present: bool `[num_experts]`, some of these that are on the GPU or on their way.
            under_way: how many are on their way.

        Returns:
            bool `[num_experts]`. None but those present if the CPU is bound by reading anyway: uploads read the same
            memory.
        """
        self._seen[layer] = tokens
        chosen = np.zeros(len(tokens), bool) if present is None else present & (tokens > 0)
        tokens = np.where(chosen, 0, tokens)
        active = np.flatnonzero(tokens)
        computing = self.costs.per_token * float(tokens.sum())
        if len(active) == 0 or computing <= self.costs.per_read * len(active):
            return chosen
        order = active[np.argsort(-tokens[active], kind="stable")]
        uploads = (under_way + np.arange(len(order) + 1)) * self.costs.per_upload
        left = np.concatenate([[0], np.cumsum(tokens[order])])
        rest = np.arange(len(order), -1, -1)
        on_cpu = np.maximum(self.costs.per_read * rest, self.costs.per_token * (left[-1] - left))
        count = int(np.argmin(np.maximum(uploads, on_cpu)))
        if count == 0:
            self.costs.per_upload *= _FORGET
        elif left[-1] - left[count] < _ENOUGH_PAIRS:
            self.costs.per_token *= _FORGET
        chosen[order[:count]] = True
        return chosen

    def likely(self, layer: int, num_experts: int) -> np.ndarray:
        """Bool `[num_experts]`: experts of a layer that were busy when it was last seen; all if it never was."""
        seen = self._seen.get(layer)
        return np.ones(num_experts, bool) if seen is None else seen >= max(1.0, _BUSY * float(seen.mean()))

    def observe_uploads(self, count: int, seconds: float) -> None:
        """`count` experts were brought to the GPU in this time."""
        if count:
            found = min(seconds / count, _MOST * self.costs.per_upload)
            self.costs.per_upload += _NEW * (found - self.costs.per_upload)

    def observe_cpu(self, num_experts: int, num_pairs: int, seconds: float) -> None:
        """The CPU computed `num_pairs` tokens of `num_experts` experts, all in all, in this time."""
        if num_pairs >= _ENOUGH_PAIRS and seconds > self.costs.per_read * num_experts:
            found = min(seconds / num_pairs, _MOST * self.costs.per_token)
            self.costs.per_token += _NEW * (found - self.costs.per_token)
