"""What a bench says about a model on a GPU beside its rate: where a step's time goes, and how near it is to its limits.

The limit of a decode step is the longer of two times: the CPU reads the experts that it computes, the GPU reads all
that it computes; and the hand-offs come on top. Bytes are the plan's, bandwidths are measured in the same process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.engine.deferral import deferral_note
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.placement import Plan

__all__ = ["GpuFigures", "gpu_figures"]

_HANDOFF_SECONDS = 10e-6
"""What a layer's hand-off may take in the limit."""
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """Beside the rate.

    Attributes:
        device: the card's name.
        strategy: how modules were placed.
        vram_peak: most bytes of VRAM that tensors took, since the process began; where memory can be lent, since it was
            divided, with all that can be lent.
        vram_bandwidth: GB/s that the GPU reads from its memory.
        num_slots: experts that the expert cache has room for.
        hit_rate: share of chosen experts that were in it.
        uploads: experts that a layer brought to the GPU in a step, mean; None if that was not measured.
        upload_share: of the misses, what is brought at last; None if nothing ever is.
        no_uploads: why nothing ever is.
        step_seconds: of a decode step, median.
        experts_seconds: of that, the CPU computed experts.
        between_seconds: of that, the CPU waited for the next layer's request: attention, router, hand-off.
        dram_bytes: read for a step's tokens by the CPU or over the link: not experts found in the cache.
        vram_bytes: read by the GPU, with them.
        roofline_seconds: the limit of a step.
        roofline_share: of the limit in what was measured.
        deferred: what is to be said of experts that arrive one layer late; nothing if none does.
    """

    device: str
    strategy: str
    vram_peak: int
    vram_bandwidth: float
    num_slots: int
    hit_rate: float
    uploads: float | None
    upload_share: float | None
    no_uploads: str
    step_seconds: float | None
    experts_seconds: float | None
    between_seconds: float | None
    dram_bytes: int | None
    vram_bytes: int | None
    roofline_seconds: float | None
    roofline_share: float | None
    deferred: str


def gpu_figures(
    runner: ModelRunner, plan: Plan, bench: GpuTimedRuns, read_bandwidth: float, vram_bandwidth: float
) -> GpuFigures:
    """Take a run apart.

    Args:
        runner: of the model that was measured.
        plan: what it was placed by.
        bench: the runs.
        read_bandwidth: GB/s of DRAM.
        vram_bandwidth: GB/s of the GPU's memory; measured before the model fills it.
    """
    cache = runner.slots.cache
    before = None if cache is None else (int(cache.policy.hits.sum()), int(cache.policy.uses.sum()))
    uploads = runner.uploads
    brought = 0 if uploads is None else uploads.statistics().brought
    shares = bench.profile() if bench.what == "decode" else None
    served = 0 if runner.server is None else len(runner.server.layers)
    deferred = 0 if runner.server is None else runner.server.deferred
    num_steps = served * (bench.new_tokens - 1) if shares is not None else 0
    done = None if uploads is None else uploads.statistics(bench.batch)
    hit_rate = 0.0
    if cache is not None and before is not None:
        uses = int(cache.policy.uses.sum()) - before[1]
        hit_rate = (int(cache.policy.hits.sum()) - before[0]) / uses if uses else 0.0
    device = runner.decoder.device
    dram_bytes = vram_bytes = roofline = None
    if shares is not None and bench.batch == 1:
        experts = sum(e.bytes_per_token for e in plan.entries if e.role == "experts" and e.device == "cpu")
        dram_bytes = round(plan.bytes_per_token_on("cpu") - hit_rate * experts)
        vram_bytes = round(plan.bytes_per_token_on("gpu") + hit_rate * experts)
        longest = max(dram_bytes / read_bandwidth, vram_bytes / vram_bandwidth) / _GIGA
        roofline = longest + served * _HANDOFF_SECONDS
    return GpuFigures(
        device=torch.cuda.get_device_name(device),
        strategy=plan.strategy,
        vram_peak=torch.cuda.max_memory_reserved(device) + (runner.lending.nbytes if runner.lending else 0),
        vram_bandwidth=vram_bandwidth,
        num_slots=0 if cache is None else cache.policy.num_slots,
        hit_rate=hit_rate,
        uploads=(done.brought - brought) / num_steps if done is not None and num_steps else None,
        upload_share=None if done is None else done.share,
        no_uploads=runner.no_uploads,
        step_seconds=None if shares is None else shares.step,
        experts_seconds=None if shares is None else shares.experts,
        between_seconds=None if shares is None else shares.between,
        dram_bytes=dram_bytes,
        vram_bytes=vram_bytes,
        roofline_seconds=roofline,
        roofline_share=None if roofline is None or shares is None else roofline / shares.step,
        deferred=deferral_note(plan, deferred) if deferred else "",
    )
