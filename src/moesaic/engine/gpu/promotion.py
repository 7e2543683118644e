"""Decides which experts deserve a place in VRAM: a score of recency and frequency, and a budget of copies per step.

The score of an expert is the number of times it was chosen, where what happened `half_life` tokens ago counts half: it
follows a conversation's topic and still knows what is always busy. Experts on the CPU replace those on the GPU with
lower scores. Copies read the same memory as the CPU's experts do, so they may take no more than a small share of what
a step reads. This module knows neither memory nor devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Move", "PromotionPolicy"]

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Move:
    """An expert that is to be copied into a slot, and the one that leaves it.

    Attributes:
        slot: where to.
        layer, expert: what.
        evicted: (layer, expert) that the slot holds until then; None if it is free.
    """

    slot: int
    layer: int
    expert: int
    evicted: tuple[int, int] | None


class PromotionPolicy:
    """Which expert is in which slot, and which should be.

    Args:
        num_layers: layers with routed experts.
        num_experts: of each layer (the most, if they differ).
        num_slots: places.
        half_life: tokens after which a use counts half; this and the next are what replays of routing liked best
            (benchmarks/results/expert-cache.md).
        advantage: how many uses more than the one that it replaces an expert needs; keeps equals from taking turns.
        share: of the bytes that the CPU reads in a step, what copies may take.

    Attributes:
        slot_of: int32 `[num_layers, num_experts]`, -1: in no slot.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        *,
        half_life: float = 128.0,
        advantage: float = 4.0,
        share: float = 0.025,
    ) -> None:
        self.slot_of = np.full((num_layers, num_experts), NOWHERE, np.int32)
        self.score = np.zeros((num_layers, num_experts), np.float64)
        self._holder = np.full(num_slots, NOWHERE, np.int64)  # layer * num_experts + expert
        self._num_experts = num_experts
        self._half_life, self._advantage, self._share = half_life, advantage, share
        self._allowance = 0.0  # copies that the budget of the steps so far still allows
        self.hits = np.zeros(num_layers, np.int64)
        self.uses = np.zeros(num_layers, np.int64)

    @property
    def num_slots(self) -> int:
        """Places."""
        return len(self._holder)

    @property
    def num_taken(self) -> int:
        """Places that experts have or are on their way to."""
        return int(np.count_nonzero(self._holder >= 0))

    def record(self, uses: np.ndarray, num_tokens: int) -> None:
        """Take note of a step.

        Args:
            uses: `[num_layers, num_experts]`, how often each expert was chosen in it.
            num_tokens: of the step.
        """
        cached = self.slot_of >= 0
        self.hits += np.where(cached, uses, 0).sum(axis=1)
        self.uses += uses.sum(axis=1)
        self.score *= 0.5 ** (num_tokens / self._half_life)
        self.score += uses
        read = np.count_nonzero(np.where(cached, 0, uses))  # experts that the CPU read
        self._allowance = min(self._allowance + self._share * float(read), float(self.num_slots))

    def hit_rates(self) -> np.ndarray:
        """Share of the uses so far that found their expert in a slot, per layer; 0 where there were none."""
        return self.hits / np.maximum(self.uses, 1)

    def moves(
        self, busy: frozenset[int] | set[int] = frozenset(), most: int | None = None, is_free: bool = False
    ) -> list[Move]:
        """What to copy next.

        The experts are entered in `slot_of` by `complete`, and those that leave are out of it at once.

        Args:
            busy: slots that a copy is under way to.
            most: how many, whatever the budget says.
            is_free: whether copies slow no step down: then they need no budget.
        """
        budget = self.num_slots if is_free else int(self._allowance)
        count = budget if most is None else min(budget, most)
        if count < 1 or self.num_slots == 0:
            return []
        wanted = self._best_outside(count)
        moves: list[Move] = []
        for flat, slot in zip(wanted, self._worst_slots(len(wanted), busy), strict=False):
            held = int(self._holder[slot])
            theirs = 0.0 if held < 0 else float(self.score.flat[held])
            if self.score.flat[flat] <= theirs + (self._advantage if theirs > 0.0 else 0.0):
                break
            layer, expert = divmod(int(flat), self._num_experts)
            evicted = None if held < 0 else divmod(held, self._num_experts)
            if evicted is not None:
                self.slot_of[evicted] = NOWHERE
            self._holder[slot] = flat
            moves.append(Move(int(slot), layer, expert, evicted))
        if not is_free:
            self._allowance -= len(moves)
        return moves

    def seed(self, uses: np.ndarray, num_tokens: int) -> None:
        """Begin with what is known from before, as if it had happened just now: at most what scores can be.

        Args:
            uses: `[num_layers, num_experts]`, how often each expert was chosen.
            num_tokens: in how many tokens.
        """
        most = self._half_life / np.log(2.0)  # the score of an expert that every token chooses
        self.score[:] = uses * min(1.0, most / max(1, num_tokens))

    def fill(self, num_experts: Sequence[int]) -> list[Move]:
        """Experts for the slots that are free: those with the highest scores, then as many of each layer.

        Whoever is chosen more than never may take the places of the latter.

        Args:
            num_experts: of each layer.
        """
        exists = np.arange(self._num_experts) < np.asarray(num_experts)[:, None]
        exists.flat[self._holder[self._holder >= 0]] = False
        layers, experts = np.nonzero(exists)
        order = np.lexsort((layers, experts, -self.score[layers, experts]))
        moves = []
        for slot, index in zip(np.flatnonzero(self._holder < 0).tolist(), order.tolist(), strict=False):
            layer, expert = int(layers[index]), int(experts[index])
            self._holder[slot] = layer * self._num_experts + expert
            moves.append(Move(slot, layer, expert, None))
        return moves

    def resize(self, num_slots: int) -> list[tuple[int, int]]:
        """Have more slots, which are free, or fewer, without the last ones.

        Of the experts in slots that go, those with high scores take the places of those with lower ones that stay, and
        the others are in no slot at once. Copies under way to slots that go must not be completed.

        Returns:
            Slots whose contents have to be copied before the next step, each from where to where.
        """
        before = self.num_slots
        if num_slots >= before:
            self._holder = np.append(self._holder, np.full(num_slots - before, NOWHERE, np.int64))
            return []
        slot_of, slots = self.slot_of.reshape(-1), np.arange(before)
        there = (self._holder >= 0) & (slot_of[self._holder] == slots)
        value = np.where(self._holder < 0, -1.0, np.where(there, self.score.ravel()[self._holder], np.inf))
        going = np.flatnonzero(there[num_slots:]) + num_slots
        going = going[np.argsort(-value[going], kind="stable")]
        staying = np.argsort(value[:num_slots], kind="stable")
        copies = []
        for source, target in zip(going.tolist(), staying.tolist(), strict=False):
            if value[source] <= value[target]:
                break
            if self._holder[target] >= 0:
                slot_of[self._holder[target]] = NOWHERE
            self._holder[target] = self._holder[source]
            slot_of[self._holder[source]] = target
            copies.append((source, target))
        moved = [source for source, _ in copies]
        rest = np.setdiff1d(going, moved)
        slot_of[self._holder[rest]] = NOWHERE
        self._holder = self._holder[:num_slots].copy()
        return copies

    def complete(self, move: Move) -> None:
        """The expert is in its slot."""
        self.slot_of[move.layer, move.expert] = move.slot

    def _best_outside(self, count: int) -> np.ndarray:
        """Experts in no slot (nor on their way to one) with the highest scores, best first."""
        score = np.where(self.slot_of >= 0, 0.0, self.score).ravel()
        on_their_way = self._holder[self._holder >= 0]
        score[on_their_way] = 0.0
        count = min(count, int(np.count_nonzero(score)))
        if count == 0:
            return np.empty(0, np.int64)
        best = np.argpartition(-score, count - 1)[:count]
        return np.asarray(best[np.argsort(-score[best], kind="stable")])

    def _worst_slots(self, count: int, busy: frozenset[int] | set[int]) -> np.ndarray:
        """Free slots, then those whose experts have the lowest scores."""
        value = np.where(self._holder < 0, -1.0, self.score.ravel()[self._holder])
        value[list(busy)] = np.inf
        count = min(count, int(np.count_nonzero(np.isfinite(value))))
        if count == 0:
            return np.empty(0, np.int64)
        worst = np.argpartition(value, count - 1)[:count]
        return np.asarray(worst[np.argsort(value[worst], kind="stable")])
