"""Misses of decode steps that the GPU brings to itself: slots to land in, how many are worth while, what came of it.

A step's graph exists without uploads and with; which of them runs, and the table by which the latter chooses, is
decided between steps from the times of those before (`upload_shares`). This module knows no graph and no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.engine.gpu.shares import Costs
from moesaic.engine.gpu.streams import Mark, SideStream
from moesaic.engine.gpu.upload_shares import ALL, UploadShares, expected_share, numbers_of
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS
from moesaic.kernels.triton.handoff import Exchange
from moesaic.modules.gpu.landing import LandingSlots, why_not_readable
from moesaic.modules.gpu.step import Routed

__all__ = ["MissUploads", "UploadStatistics", "seconds_to_bring", "start_uploads"]

_TRIALS = 4


@dataclass(frozen=True, slots=True)
class UploadStatistics:
    """What uploads did so far.

    Attributes:
        share: of a step's misses, what is brought when nothing is tried; None: numbers are fixed.
        steps: that brought some.
        missing: distinct experts that were missing in these, over all layers.
        brought: of these.
    """

    share: float | None
    steps: int
    missing: int
    brought: int


class MissUploads:
    """Uploads of a runner's decode steps.

    Args:
        landing: where experts land.
        shares: how many are worth while.

    Attributes:
        fixed: if set, this table of numbers (see `LandingSlots`) is used in all steps, whatever they take; for benches.
        share: of the step that has begun, in eighths; 0 if it brings none.
    """

    def __init__(self, landing: LandingSlots, shares: UploadShares) -> None:
        self.landing, self.shares = landing, shares
        self.fixed: list[int] | None = None
        self._entered: list[int] = [0] * (landing.max_distinct + 1)
        pinned = landing.numbers.is_cuda
        self._staged = torch.zeros(landing.max_distinct + 1, dtype=torch.int32, pin_memory=pinned)
        self._counts = torch.zeros(2, dtype=torch.int64, pin_memory=pinned)
        self._steps = self.share = 0
        device = landing.numbers.device
        self._side, self._inner_is_there, self._down_is_there = SideStream(device), Mark(device), Mark(device)

    def takes(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens can bring experts."""
        return num_tokens <= MAX_DECODE_TOKENS

    def before_step(self, batch: int, is_quiet: bool) -> bool:
        """Choose for the step that begins, on its stream.

        Args:
            batch: sequences of it.
            is_quiet: see `UploadShares`.

        Returns:
            Whether it brings any.
        """
        landing = self.landing
        self.share = ALL if self.fixed is not None else self.shares.begin(batch, is_quiet)
        wanted = self.fixed or numbers_of(self.share, landing.max_distinct, landing.num_slots)
        if not any(wanted):
            return False
        self._steps += 1
        if wanted != self._entered:
            self._staged.copy_(torch.tensor(wanted, dtype=torch.int32))
            landing.numbers.copy_(self._staged, non_blocking=True)
            self._entered = wanted
        return True

    def after_step(self, seconds: float, is_quiet: bool) -> None:
        """The step that had begun is over; it took so long."""
        if self.fixed is None:
            self.shares.observe(seconds, is_quiet)

    def hand_off(self, exchange: Exchange, position: int, routed: Routed) -> None:
        """Hand a layer's misses to the CPU but for some, which set out for the GPU."""
        picks = self.landing.picks(len(routed.hidden))
        hidden = routed.hidden if routed.request is None else None  # the router has written them
        exchange.hand_off(position, hidden, routed.chosen, routed.misses, routed.weights, picks)
        self._side.follow()
        with self._side.use():  # what else the GPU computes need not wait for the link
            self.landing.bring(routed.layer, part="inner")
            self._inner_is_there.set()
            self.landing.bring(routed.layer, part="down")
            self._down_is_there.set()

    def compute(self, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """Add what came: see `LandingSlots.down`. The first half is computed while the second is on its way."""
        self._inner_is_there.wait()
        inner = self.landing.inner(routed)
        self._down_is_there.wait()
        return self.landing.down(inner, routed, total)

    def report(self) -> None:
        """The last thing of a step that brings experts: let the CPU see what it did."""
        self._counts.copy_(self.landing.counts, non_blocking=True)

    def statistics(self, batch: int = 1) -> UploadStatistics:
        """What they did so far, in steps that are over; the share is that of `batch` sequences."""
        missing, brought = self._counts.tolist()
        share = self.shares.usual(batch) / ALL if self.fixed is None else None
        return UploadStatistics(share, self._steps, missing, brought)


def start_uploads(
    routed: Sequence[PackedExperts], num_slots: int, top_k: int, device: torch.device, costs: Costs
) -> MissUploads | str:
    """Uploads for these experts, or why there are none.

    Args:
        routed: the routed experts of every layer, in page-locked memory.
        num_slots: room for so many in VRAM.
        top_k: experts per token.
        device: the GPU.
        costs: what experts cost the CPU.
    """
    problem = why_not_readable(routed)
    if problem:
        return problem
    landing = LandingSlots(routed, num_slots, top_k, device)
    per_upload = seconds_to_bring(landing, routed, top_k)
    per_expert = costs.per_read + costs.per_token
    expected = expected_share(top_k, per_upload, per_expert, costs.fixed)
    if expected == 0:
        return (
            f"an expert takes {per_upload * 1e3:.2f} ms over the link, and the CPU computes {top_k} in "
            f"{(costs.fixed + top_k * per_expert) * 1e3:.2f} ms"
        )
    return MissUploads(landing, UploadShares(expected))


def seconds_to_bring(landing: LandingSlots, routed: Sequence[PackedExperts], count: int) -> float:
    """Seconds that one of `count` experts of the first layer takes, when all come together and nobody else does.

    Other experts come each time, as far as there are others: none should be in a cache.
    """
    count = min(count, landing.num_slots)
    device = landing.numbers.device
    times = []
    for trial in range(_TRIALS + 1):
        numbers = torch.full((landing.num_slots,), -1, dtype=torch.int32)
        numbers[:count] = (trial * count + torch.arange(count)) % routed[0].num_experts
        chosen = numbers.to(device)
        begun, done = Mark(device, timed=True), Mark(device, timed=True)
        begun.set()
        landing.bring(0, chosen)
        done.set()
        done.synchronize()
        times.append(done.seconds_since(begun) / count)
    return statistics.median(times[1:])  # the first may have waited for a compiler
