"""Busy experts in VRAM: slots, tables that steps read, and copies on a side stream.

Slots are equal and hold any layer's experts. A step looks experts up in a table in device memory, so a graph that was
captured once follows every change. Between steps finished copies are entered and new ones begin, while experts that
leave were taken out of the table before the step in which their slot is written: no kernel ever reads a slot that is
being filled. Which expert deserves a slot is `promotion`'s business.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesaic.engine.gpu.copy_guard import CopyGuard
from moesaic.engine.gpu.promotion import Move, PromotionPolicy
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.grouped_experts import ExpertPairs
from moesaic.modules.gpu.experts import SlotLayout, copy_experts, slot_bytes, slot_layout
from moesaic.modules.gpu.step import Routed

__all__ = ["CacheStatistics", "ExpertCache"]

_JOINING_BYTES = 16 * 1024**2
"""Of experts for new slots, what may begin to be copied in a step, if that is more than one: 0.3 ms of a link of
55 GB/s."""

_CATCHING_UP_BYTES = 64 * 1024**2
"""Of any experts, what is copied while no step runs before it is looked whether one is asked for."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What the cache did so far.

    Attributes:
        num_slots: experts that it can hold.
        num_held: experts that it holds.
        hit_rates: per layer, the share of chosen experts that were there.
        hit_rate: of all layers together.
        copied: experts copied.
    """

    num_slots: int
    num_held: int
    hit_rates: tuple[float, ...]
    hit_rate: float
    copied: int


class ExpertCache:
    """Slots for the routed experts of a model.

    Args:
        routed: the routed experts of every layer, in DRAM; page-locked, or copies are slow.
        num_slots: how many experts to hold.
        device: the GPU.
        policy: who deserves a slot; the default is `PromotionPolicy`'s.
        steps_per_decision: steps between two questions to the policy, which take a few tenths of a millisecond.
        is_guarded: whether copies that make steps longer become few (`CopyGuard`), whatever the policy wants.
        arena: uint8, memory for slots on the GPU, perhaps for more than `num_slots`; its own if None.
    """

    def __init__(
        self,
        routed: Sequence[PackedExperts],
        num_slots: int,
        device: torch.device,
        policy: PromotionPolicy | None = None,
        steps_per_decision: int = 8,
        is_guarded: bool = True,
        arena: torch.Tensor | None = None,
    ) -> None:
        self._routed = list(routed)
        self._device = device
        size = max(slot_bytes(experts) for experts in routed)
        self._layouts: list[SlotLayout] = [slot_layout(experts, device, stride=size) for experts in routed]
        most = max(experts.num_experts for experts in routed)
        self.policy = policy or PromotionPolicy(len(self._routed), most, num_slots)
        if arena is None:
            arena = torch.empty(num_slots * size, dtype=torch.uint8, device=device)
        self.arena, self._slot_bytes = arena, size
        self._capacity = arena.numel() // size  # slots that there are addresses for
        self._most = self._capacity  # slots that there may be
        self._tables = torch.full((len(self._routed), most), -1, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._staged = torch.full((len(self._routed), most), -1, dtype=torch.int32, pin_memory=pinned)
        self._stream = torch.cuda.Stream(device) if pinned else None
        if self._stream is not None:  # whoever had the arena's memory before may not be through with it
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._leaving: list[Move] = []  # out of the table from the next step on; copied after that step began
        self._joining: deque[Move] = deque()  # into slots that are new; copied a few in a step
        self._under_way: list[tuple[Move, torch.cuda.Event | None]] = []
        self._seen = np.zeros((len(self._routed), most), np.uint32)
        self._copied = 0
        self._guard = CopyGuard() if is_guarded else None
        self._began, self._is_busy = 0.0, False  # when the step began, and whether something was copied during it
        self._steps_per_decision = steps_per_decision
        self._steps = self._tokens = 0  # since the policy was asked last
        self._source: tuple[Sequence[int], np.ndarray] | None = None  # uses, and of which layers

    @property
    def is_busy(self) -> bool:
        """Whether something is copied during the step that has begun."""
        return self._is_busy

    @property
    def num_taken(self) -> int:
        """Slots that experts have, or to which their copies have begun."""
        return self.policy.num_taken - len(self._joining)

    def fill(self, uses: np.ndarray | None = None, num_tokens: int = 0) -> None:
        """Give free slots to experts and wait until they are there.

        Args:
            uses: int `[layers, num_experts]`, how often each was chosen in a run before, whose busiest get the slots;
                None: as many of each layer.
            num_tokens: of that run.
        """
        if uses is not None:
            self.policy.seed(uses, num_tokens)
        self._copy_now(self.policy.fill([experts.num_experts for experts in self._routed]))

    def catch_up(self) -> bool:
        """While no step runs: copy a piece of what the policy wants, whatever it would cost a step, and wait for it.

        Returns:
            Whether there was anything.
        """
        self._record()
        self.wait()  # those that leave are out of the table
        piece = max(1, _CATCHING_UP_BYTES // self._slot_bytes)
        moves, self._leaving = self._leaving, []
        moves += [self._joining.popleft() for _ in range(min(len(self._joining), piece))]
        if not moves:
            moves = self.policy.moves(most=piece, is_free=True)
            if not moves:
                return False
            self._enter()
        if self._stream is not None:  # somebody who was not waited for may still read slots
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._copy_now(moves)
        self._copied += len(moves)
        return True

    def restart(self, policy: PromotionPolicy) -> None:
        """Begin anew, with no experts, by another policy, which may have fewer slots."""
        self.wait()
        self._leaving, self.policy, self._most = [], policy, policy.num_slots
        self._joining.clear()
        self._steps = self._tokens = self._copied = 0
        self._source = None
        self._guard = None if self._guard is None else CopyGuard()
        self._enter()

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self._slot_bytes

    def resize(self, num_slots: int) -> None:
        """Have so many slots, between two steps, when the GPU has nothing to do: the last ones go, or new ones come.

        What is used most stays, and moves to other slots if it has to, in the order of the current stream. New slots
        are filled during the next steps.
        """
        num_slots = min(num_slots, self._most)
        before = self.policy.num_slots
        if num_slots == before:
            return
        self._record()  # by the slots that there were
        self.wait()
        for source, target in self.policy.resize(num_slots):
            self._slot(target).copy_(self._slot(source), non_blocking=True)
        self._leaving = [move for move in self._leaving if move.slot < num_slots]
        self._joining = deque(move for move in self._joining if move.slot < num_slots)
        self._enter()
        if num_slots > before:
            self._joining.extend(self.policy.fill([experts.num_experts for experts in self._routed]))

    def table(self, layer: int) -> torch.Tensor:
        """int32 `[num_experts]` on the GPU, the slot of each expert or -1."""
        return self._tables[layer, : self._routed[layer].num_experts]

    def compute(self, routed: Routed) -> torch.Tensor:
        """Weighted sum of the chosen experts that are in slots: float32 `[tokens, hidden_size]`."""
        assert routed.slots is not None
        table, num_slots = self.table(routed.layer), self._capacity
        return self._layouts[routed.layer].compute(
            routed.hidden, routed.slots, routed.chosen, routed.weights, self.arena, table, num_slots
        )

    def held(self, layer: int) -> np.ndarray:
        """Bool `[num_experts]`: experts that have slots; those that leave at the next step have none any more."""
        return np.asarray(self.policy.slot_of[layer, : self._routed[layer].num_experts] >= 0)

    def multiply(self, layer: int, pairs: ExpertPairs) -> None:
        """Products of a chunk's pairs with the experts that are in slots."""
        blocks = pairs.blocks(self.table(layer))
        pairs.multiply(self.arena, self._layouts[layer].kernel, self._capacity, blocks)

    def before_step(self) -> None:
        """Enter experts whose copies are complete and take out those that leave; on the stream of the step."""
        self._began = time.perf_counter()
        self._is_busy = bool(self._under_way or self._leaving or self._joining)
        finished = [(move, event) for move, event in self._under_way if event is None or event.query()]
        for move, event in finished:
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
            self.policy.complete(move)
        if finished:
            self._under_way = [item for item in self._under_way if item not in finished]
        if finished or self._leaving:
            self._enter()

    def during_step(self) -> None:
        """Begin the copies into slots that the step, which has been launched, does not read any more."""
        moves, self._leaving = self._leaving, []
        for _ in range(min(len(self._joining), max(1, _JOINING_BYTES // self._slot_bytes))):
            moves.append(self._joining.popleft())
        for move in moves:
            if self._stream is None:
                self._copy(move)
                self._under_way.append((move, None))
                continue
            with torch.cuda.stream(self._stream):
                self._copy(move)
                event = torch.cuda.Event()
                event.record()
            self._under_way.append((move, event))
        if self._guard is not None:
            self._guard.begin(len(moves))
        self._copied += len(moves)

    def after_step(self, layers: Sequence[int], uses: np.ndarray, num_tokens: int, way: Hashable = 0) -> None:
        """Take note of what was used, and choose what to copy during the next step.

        Args:
            layers: whose uses these are.
            uses: uint32 `[layers, num_experts]`, how often each was chosen since the beginning; it may wrap around. The
                array is kept, and read again before slots go or come.
            num_tokens: of the step.
            way: steps of the same number of tokens and the same way take about the same time.
        """
        guard = self._guard
        if guard is not None:
            guard.observe((num_tokens, way), time.perf_counter() - self._began, self._is_busy)
            if not self._under_way and not self._joining:
                guard.end()
        self._steps, self._tokens, self._source = self._steps + 1, self._tokens + num_tokens, (layers, uses)
        # With a guard, after a step without copies: what copies cost is seen beside those.
        if self._steps < self._steps_per_decision or (guard is not None and self._is_busy):
            return
        self._record()
        busy = {move.slot for move, _ in self._under_way} | {move.slot for move in self._joining}
        if guard is None:
            self._leaving = self.policy.moves(busy)
            return
        asked = time.perf_counter()
        self._leaving = self.policy.moves(busy, guard.allowance())
        guard.spend(time.perf_counter() - asked)

    def _record(self) -> None:
        """Tell the policy what was used since it was told last."""
        if self._source is None:
            return
        num_tokens, self._steps, self._tokens = self._tokens, 0, 0
        layers, uses = self._source
        new = np.zeros_like(self._seen)
        new[layers] = uses - self._seen[layers]
        self._seen[layers] = uses
        self.policy.record(new.astype(np.int64), num_tokens)

    def wait(self) -> None:
        """Let all copies that were begun end, and enter them."""
        if self._stream is not None:
            self._stream.synchronize()
        self.before_step()

    def statistics(self) -> CacheStatistics:
        """What it did so far."""
        policy = self.policy
        total = int(policy.uses.sum())
        return CacheStatistics(
            policy.num_slots,
            int((policy.slot_of >= 0).sum()),
            tuple(float(rate) for rate in policy.hit_rates()),
            int(policy.hits.sum()) / total if total else 0.0,
            self._copied,
        )

    def _slot(self, slot: int) -> torch.Tensor:
        return self.arena.narrow(0, slot * self._slot_bytes, self._slot_bytes)

    def _enter(self) -> None:
        """What the policy says is what steps see from now on."""
        self._staged.copy_(torch.from_numpy(self.policy.slot_of))
        self._tables.copy_(self._staged, non_blocking=True)

    def _copy_now(self, moves: Sequence[Move]) -> None:
        """Copy experts, wait until they are there, and enter them."""
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for move in moves:
                self._copy(move)
        self.wait()
        for move in moves:
            self.policy.complete(move)
        self._enter()

    def _copy(self, move: Move) -> None:
        experts, layout = self._routed[move.layer], self._layouts[move.layer]
        copy_experts(experts, move.expert, 1, layout, self.arena, move.slot)
