"""What a streamed expert costs the link, and one that stays costs the CPU: measured before the first prompt.

The CPU is measured on a layer's own experts in three sizes, from which follow what it takes to begin, to read an expert
and to compute a token. Of a few trials the quickest counts: others were disturbed. This module decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from moesaic.engine.gpu.shares import Costs
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.streams import Mark
from moesaic.kernels import moe_forward
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.experts import slot_bytes

__all__ = ["cpu_costs", "measure_costs"]

_TRIALS = 4
_EXPERTS = 32  # that are computed at a time
_TOKENS = 32  # of each
_FLOAT = 4


def measure_costs(experts: PackedExperts, staging: StagingBuffers) -> Costs:
    """Costs of a layer.

    Args:
        experts: of the first layer in `staging`.
        staging: whose groups are filled.
    """
    per_upload = _upload_seconds(experts, staging)
    fixed, per_read, per_token = cpu_costs(experts, _quickest_forward(experts))
    per_row = experts.hidden * _FLOAT * per_upload / slot_bytes(experts)
    return Costs(per_upload, fixed, per_row, per_read, per_token)


def cpu_costs(experts: PackedExperts, seconds: Callable[[int, int], float]) -> tuple[float, float, float]:
    """Seconds to begin, to read an expert, and to compute a token of an expert.

    Args:
        experts: of which some are computed.
        seconds: that so many experts with so many tokens each take.
    """
    count = min(_EXPERTS, experts.num_experts)
    one, few, many = seconds(1, 1), seconds(count, 1), seconds(count, _TOKENS)
    per_token = max(0.0, many - few) / (count * (_TOKENS - 1))
    per_expert = max(0.0, few - one) / max(1, count - 1)
    per_read = max(0.0, per_expert - per_token)
    # No time is nothing: what takes longer than expected can be learnt, what takes for ever less cannot.
    return max(one - per_read - per_token, 0.1 * one), max(per_read, 1e-9), max(per_token, 1e-9)


def _quickest_forward(experts: PackedExperts) -> Callable[[int, int], float]:
    """Times `moe_forward` on other experts each time, as far as there are others: none should be in a cache."""
    state = {"next": 0}

    def seconds(count: int, tokens: int) -> float:
        times = []
        for _ in range(_TRIALS):
            numbers = (state["next"] + torch.arange(count)) % experts.num_experts
            state["next"] += count
            index = numbers.repeat_interleave(tokens).unsqueeze(1).contiguous()
            x = torch.randn(len(index), experts.hidden)
            weights, out = torch.ones(len(index), 1), torch.empty_like(x)
            started = time.perf_counter()
            moe_forward(x, index, weights, experts, out=out)
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds


def _upload_seconds(experts: PackedExperts, staging: StagingBuffers) -> float:
    """Of one expert, when a group of neighbours is copied."""
    count = min(staging.group, experts.num_experts)
    times = []
    for _ in range(_TRIALS):
        (group,) = staging.plan(np.arange(count), 0)
        begun, done = Mark(staging.device, timed=True), Mark(staging.device, timed=True)
        staging.fill(0, group, begun)
        with staging.copies.use():
            done.set()
        done.synchronize()
        times.append(done.seconds_since(begun) / count)
    return min(times)
