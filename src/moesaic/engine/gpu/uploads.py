"""Misses of decode steps that the CPU sends to the GPU: slots to land in, how many are worth while, what came of it.

A step's graph exists without uploads and with; which of them runs, and the table by which the CPU chooses then, is
decided between steps from the times of those before (`upload_shares`). This module knows no graph and no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.engine.gpu.copy_queue import copy_queue
from moesaic.engine.gpu.shares import Costs
from moesaic.engine.gpu.streams import Mark, SideStream
from moesaic.engine.gpu.upload_shares import ALL, UploadShares, expected_share, numbers_of
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS
from moesaic.kernels.triton.handoff import Exchange
from moesaic.modules.gpu.landing import LandingSlots, why_not_sent
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
        fixed: if set, this table of numbers (see `ExpertUploads.set_numbers`) is used in all steps, whatever they take;
            for benches.
        share: of the step that has begun, in eighths; 0 if it brings none.
        sender: what the server of experts needs in steps that bring some.
    """

    def __init__(self, landing: LandingSlots, shares: UploadShares) -> None:
        self.landing, self.shares = landing, shares
        self.fixed: list[int] | None = None
        self.copies = SideStream(landing.device)
        self.sender = landing.uploads(copy_queue(self.copies))
        self._entered: list[int] = []
        self._steps = self.share = 0

    def takes(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens can bring experts."""
        return num_tokens <= MAX_DECODE_TOKENS

    def is_settled(self, batch: int) -> bool:
        """Whether no other numbers are tried in steps of so many sequences soon; see `UploadShares`."""
        return self.fixed is not None or self.shares.is_settled(batch)

    def before_step(self, batch: int, is_quiet: bool) -> bool:
        """Choose for the step that begins.

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
            self.sender.set_numbers(wanted)
            self._entered = wanted
        return True

    def after_step(self, seconds: float, is_quiet: bool) -> None:
        """The step that had begun is over; it took so long."""
        if self.fixed is None:
            self.shares.observe(seconds, is_quiet)

    def compute(self, exchange: Exchange, position: int, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """Add what comes for a request: see `LandingSlots.down`. The first half is computed while the second comes."""
        exchange.wait_there(position, self.landing.inner_arrived)
        inner = self.landing.inner(routed)
        exchange.wait_there(position, self.landing.down_arrived)
        return self.landing.down(inner, routed, total)

    def restart(self) -> None:
        """After a failure, when the device has done all that it was asked for: requests are counted anew."""
        self.landing.restart()

    def statistics(self, batch: int = 1) -> UploadStatistics:
        """What they did so far; the share is that of `batch` sequences."""
        share = self.shares.usual(batch) / ALL if self.fixed is None else None
        return UploadStatistics(share, self._steps, self.sender.num_missing, self.sender.num_brought)


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
    problem = why_not_sent(routed)
    if problem:
        return problem
    uploads = MissUploads(LandingSlots(routed, num_slots, top_k, device), UploadShares())
    per_upload = seconds_to_bring(uploads, top_k)
    per_expert = costs.per_read + costs.per_token
    expected = expected_share(top_k, per_upload, per_expert, costs.fixed)
    if expected == 0:
        return (
            f"an expert takes {per_upload * 1e3:.2f} ms over the link, and the CPU computes {top_k} in "
            f"{(costs.fixed + top_k * per_expert) * 1e3:.2f} ms"
        )
    uploads.shares = UploadShares(expected)
    return uploads


def seconds_to_bring(uploads: MissUploads, count: int) -> float:
    """Seconds that one of `count` experts of the first layer takes, when all come together and nobody else does.

    Other experts come each time, as far as there are others: none should be in a cache.
    """
    landing, device = uploads.landing, uploads.landing.device
    count = min(count, landing.num_slots)
    times = []
    for trial in range(_TRIALS + 1):
        experts = [(trial * count + each) % landing.routed[0].num_experts for each in range(count)]
        begun, done = Mark(device, timed=True), Mark(device, timed=True)
        with uploads.copies.use():
            begun.set()
            uploads.sender.bring(0, experts)
            done.set()
        done.synchronize()
        times.append(done.seconds_since(begun) / count)
    return statistics.median(times[1:])
