"""What bytes allow: how much faster many users can decode together than one, if reading weights is all that costs.

Every user's token needs all weights but the experts, and some experts of each layer; an expert that several users
chose is read once for all of them. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bound", "ExpertBytes", "StepBytes", "bound_of", "expected_distinct"]


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """Routed experts of one layer: how many, how many of them a token chooses, bytes of one."""

    num_experts: int
    top_k: int
    expert_bytes: float


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a decode step reads.

    Attributes:
        shared: bytes of all weights but routed experts.
        layers: routed experts, of the layers that have some.
        cache: bytes of the KV cache that one user's token reads.
    """

    shared: float
    layers: tuple[ExpertBytes, ...]
    cache: float = 0.0

    def of(self, users: int, distinct: Sequence[float] | None = None) -> float:
        """Bytes of a step with one token of each user.

        Args:
            users: how many.
            distinct: of each layer, how many different experts they chose; those of random routing if None.
        """
        if distinct is None:
            distinct = [expected_distinct(layer.num_experts, layer.top_k, users) for layer in self.layers]
        experts = sum(layer.expert_bytes * count for layer, count in zip(self.layers, distinct, strict=True))
        return self.shared + experts + users * self.cache


@dataclass(frozen=True, slots=True)
class Bound:
    """Of the decode rate of several users.

    Attributes:
        users: how many.
        distinct: different experts that they chose in a layer, mean over layers and steps; None if not measured.
        expected_distinct: the same if every token chose at random.
        step_bytes: that one of their steps reads.
        gain: bound over the rate of one user.
        tokens_per_second: bound.
        measured: what they reached.
        share: of the bound.
    """

    users: int
    distinct: float | None
    expected_distinct: float
    step_bytes: float
    gain: float
    tokens_per_second: float
    measured: float
    share: float


def expected_distinct(num_experts: int, top_k: int, users: int) -> float:
    """Different experts that tokens of so many users choose on average, if all choices are equally likely."""
    return float(num_experts * (1 - (1 - top_k / num_experts) ** users))


def bound_of(
    users: int, measured: float, one_user: float, step: StepBytes, distinct: Sequence[float] | None = None
) -> Bound:
    """The bound for some users, from what one of them reaches.

    Args:
        users: how many.
        measured: their tokens per second.
        one_user: tokens per second of one, of which the time of a byte follows.
        step: what steps read.
        distinct: as for `StepBytes.of`.
    """
    nbytes = step.of(users, distinct)
    gain = users * step.of(1) / nbytes
    expected = [expected_distinct(layer.num_experts, layer.top_k, users) for layer in step.layers]
    return Bound(
        users=users,
        distinct=None if distinct is None else _mean(distinct),
        expected_distinct=_mean(expected),
        step_bytes=nbytes,
        gain=gain,
        tokens_per_second=gain * one_user,
        measured=measured,
        share=measured / (gain * one_user),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
