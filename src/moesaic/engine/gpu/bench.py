"""What a bench says about a model on a GPU beside its rate: where a step's time goes, and how near it is to its limits.

The limit of a decode step is the longer of two times: the CPU reads the experts that it computes, the GPU reads all
that it computes; and the hand-offs come on top. Bytes are the plan's, bandwidths are measured in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moesaic.engine.deferral import deferral_note
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.foretold import Foretold, foretold_counts
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.gpu.warm_up import WarmUp
from moesaic.placement import Plan
from moesaic.placement.roofline import HANDOFF_SECONDS

__all__ = ["GpuFigures", "gpu_figures"]

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
        layer_hit_rates: the same of each layer with routed experts; none without a cache.
        uploads: experts that a layer brought to the GPU in a step, mean; None if that was not measured.
        upload_share: of the misses, what is brought at last; None if nothing ever is.
        no_uploads: why nothing ever is.
        foretold: what was read and sent before it was asked for; None if nothing was.
        step_seconds: of a decode step, median.
        experts_seconds: of that, the CPU computed experts.
        between_seconds: of that, the CPU waited for the next layer's request: attention, router, hand-off.
        dram_bytes: read for a step's tokens by the CPU or over the link: not experts found in the cache.
        vram_bytes: read by the GPU, with them.
        roofline_seconds: the limit of a step.
        roofline_share: the limit over the median step, of a run that is timed step by step.
        runs_roofline_share: the limit over what a step of the median run took; None without runs.
        warm_up: what was decoded before the runs, until what adapts had settled; None if nobody waited for that.
        deferred: what is to be said of experts that arrive one layer late; nothing if none does.
    """

    device: str
    strategy: str
    vram_peak: int
    vram_bandwidth: float
    num_slots: int
    hit_rate: float
    layer_hit_rates: tuple[float, ...]
    uploads: float | None
    upload_share: float | None
    no_uploads: str
    foretold: Foretold | None
    step_seconds: float | None
    experts_seconds: float | None
    between_seconds: float | None
    dram_bytes: int | None
    vram_bytes: int | None
    roofline_seconds: float | None
    roofline_share: float | None
    runs_roofline_share: float | None
    warm_up: WarmUp | None
    deferred: str


def gpu_figures(
    runner: ModelRunner,
    plan: Plan,
    bench: GpuTimedRuns,
    read_bandwidth: float,
    vram_bandwidth: float,
    runs: Sequence[float] = (),
    warm_up: WarmUp | None = None,
) -> GpuFigures:
    """Take another run apart.

    Args:
        runner: of the model that was measured.
        plan: what it was placed by.
        bench: the runs.
        read_bandwidth: GB/s of DRAM.
        vram_bandwidth: GB/s of the GPU's memory; measured before the model fills it.
        runs: tokens per second of those that were measured before.
        warm_up: that came before these.
    """
    cache = runner.slots.cache
    before = _counts(cache)
    uploads = runner.uploads
    brought = 0 if uploads is None else uploads.statistics().brought
    told = foretold_counts(runner.server, uploads)
    shares = bench.profile() if bench.what == "decode" else None
    served = 0 if runner.server is None else len(runner.server.layers)
    deferred = 0 if runner.server is None else runner.server.deferred
    num_steps = served * (bench.new_tokens - 1) if shares is not None else 0
    done = None if uploads is None else uploads.statistics(bench.batch)
    hits, uses = _counts(cache) - before
    hit_rate = float(hits.sum() / max(1, uses.sum()))
    device = runner.decoder.device
    dram_bytes = vram_bytes = roofline = None
    if shares is not None and bench.batch == 1:
        experts = sum(e.bytes_per_token for e in plan.entries if e.role == "experts" and e.device == "cpu")
        dram_bytes = round(plan.bytes_per_token_on("cpu") - hit_rate * experts)
        vram_bytes = round(plan.bytes_per_token_on("gpu") + hit_rate * experts)
        longest = max(dram_bytes / read_bandwidth, vram_bytes / vram_bandwidth) / _GIGA
        roofline = longest + served * HANDOFF_SECONDS
    return GpuFigures(
        device=torch.cuda.get_device_name(device),
        strategy=plan.strategy,
        vram_peak=torch.cuda.max_memory_reserved(device) + (runner.lending.nbytes if runner.lending else 0),
        vram_bandwidth=vram_bandwidth,
        num_slots=0 if cache is None else cache.policy.num_slots,
        hit_rate=hit_rate,
        layer_hit_rates=tuple(float(rate) for rate in hits / np.maximum(1, uses)),
        uploads=(done.brought - brought) / num_steps if done is not None and num_steps else None,
        upload_share=None if done is None else done.share,
        no_uploads=runner.no_uploads,
        foretold=foretold_counts(runner.server, uploads).since(told, num_steps),
        step_seconds=None if shares is None else shares.step,
        experts_seconds=None if shares is None else shares.experts,
        between_seconds=None if shares is None else shares.between,
        dram_bytes=dram_bytes,
        vram_bytes=vram_bytes,
        roofline_seconds=roofline,
        roofline_share=None if roofline is None or shares is None else roofline / shares.step,
        # With one sequence: what a step took is what a token took.
        runs_roofline_share=None if roofline is None or not runs else roofline * statistics.median(runs),
        warm_up=warm_up,
        deferred=deferral_note(plan, deferred) if deferred else "",
    )


def _counts(cache: ExpertCache | None) -> np.ndarray:
    """int64 `[2, layers]`: chosen experts that were in the cache, and all of them, so far."""
    return np.zeros((2, 0), np.int64) if cache is None else np.stack([cache.policy.hits, cache.policy.uses])
