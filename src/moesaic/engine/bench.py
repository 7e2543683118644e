"""Measures decode and prefill of a model, real or with random weights of real dimensions, against the limit of DRAM.

A synthetic model goes through the same loader as any other, and every run through the same steps as those of
`moesaic run`, but for text.
What is measured is kept apart from what is calculated: bytes per token are the plan's, and a rate for more layers than
were run is marked as extrapolated.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from moesaic.engine.bench_checks import check_batch, check_context, check_trace
from moesaic.engine.deferral import check_deferral
from moesaic.engine.expert_profile import check_profile_target, check_profile_use
from moesaic.engine.loader import Prepared, load
from moesaic.engine.subjects import expert_formats, num_layers_of, prepare_subject
from moesaic.engine.timed_runs import TimedRuns, What
from moesaic.errors import GenerationError
from moesaic.kernels import active_isa, num_threads, read_bandwidth, set_num_threads
from moesaic.placement import DEFAULT_CONTEXT, Rules, detect_hardware

if TYPE_CHECKING:
    from moesaic.engine.gpu.bench import GpuFigures
    from moesaic.engine.gpu.timed_runs import GpuTimedRuns
    from moesaic.engine.gpu.warm_up import WarmUp

__all__ = ["BenchResult", "measure", "vram_rate"]

_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, and what follows from it.

    Attributes:
        what: "decode" or "prefill".
        model: preset or MODEL.
        weight_format: format(s) of the experts.
        num_layers: layers that were run.
        total_layers: layers of the real model.
        isa: instruction set of the kernels.
        threads: worker threads.
        prompt_tokens: tokens of the prompt.
        num_tokens: tokens decoded in a run (0 for prefill).
        runs: tokens per second of every run.
        tokens_per_second: their median.
        nbytes: bytes of the weights in memory (from the plan).
        bytes_per_token: bytes of weights that a token reads (from the plan).
        read_bandwidth: GB/s that plain reading sustains here (the median of its repetitions).
        gigabytes_per_second: bytes per token times tokens per second; None for prefill, which reads a weight once for
            many tokens.
        bandwidth_share: of that in `read_bandwidth`.
        python_share: share of the time that no native call was computing, in a run of its own.
        layer_share: share of the time spent in decoder layers, from that run.
        extrapolated_tokens_per_second: with all layers, if fewer were run: calculated. Only the last token
            of a prompt goes through all of the last layer, which is not counted among those that are repeated.
        batch: sequences that ran together.
        gpu: what there is to say about a model on a GPU (see `engine.gpu.bench`); bandwidth and shares of Python and
            layers are None then.
    """

    what: What
    model: str
    weight_format: str
    num_layers: int
    total_layers: int
    isa: str
    threads: int
    prompt_tokens: int
    num_tokens: int
    runs: tuple[float, ...]
    tokens_per_second: float
    nbytes: int
    bytes_per_token: int
    read_bandwidth: float
    gigabytes_per_second: float | None
    bandwidth_share: float | None
    python_share: float | None
    layer_share: float | None
    extrapolated_tokens_per_second: float | None
    batch: int = 1
    gpu: GpuFigures | None = None


def measure(
    what: What,
    *,
    model: str | None = None,
    preset: str | None = None,
    weight_format: str = "Q4_K",
    num_layers: int | None = None,
    num_tokens: int = 32,
    prompt_tokens: int = 16,
    repeat: int = 3,
    threads: int | None = None,
    gguf: str | None = None,
    plan: str | Rules = "auto",
    vram: int | None = None,
    context: int | None = None,
    batch: int = 1,
    offline: bool = False,
    progress: bool = False,
    trace: Path | None = None,
    expert_profile: str | Path | None = None,
    save_expert_profile: str | Path | None = None,
    defer_experts: int = 0,
) -> BenchResult:
    """Load or build a model and measure it.

    Args:
        what: decode (`num_tokens` after a prompt) or prefill (the prompt).
        model: MODEL as for `AutoModelForCausalLM.from_pretrained`; or
        preset: name of one of `presets.PRESETS`.
        weight_format: of a synthetic model's matrices, as `FormatMix.parse` takes it.
        num_layers: layers of a synthetic model; all if None.
        num_tokens: tokens to decode in a run, at least 1.
        prompt_tokens: tokens of the prompt, at least 1.
        repeat: runs, at least 1. Before them one warms up; decode on a GPU as long as it takes until what adapts has
            settled, within limits (see `engine.gpu.warm_up`).
        threads: worker threads; the default if None.
        gguf: as for `from_pretrained`.
        plan: as for `from_pretrained`.
        vram: bytes, as for `from_pretrained`.
        context: as for `from_pretrained`; what the bench needs, at least 4096, if None.
        batch: sequences that run together; more than 1 on a GPU only.
        offline: as for `from_pretrained`.
        progress: as for `from_pretrained`.
        trace: file for a Chrome trace of a few decode steps on a GPU.
        expert_profile: as for `from_pretrained`.
        save_expert_profile: file to write the use of experts to.
        defer_experts: as for `from_pretrained`.

    Raises:
        ConfigError: an unknown preset, or more layers than it has; a trace of something else than decode on a GPU.
        UnsupportedFormatError: rows of the model are no whole number of the format's blocks.
        PlanDoesNotFitError: the model does not fit in memory.
        GenerationError: prompt and tokens are longer than the context.
        PlanError: the plan cannot be made.
    """
    if threads is not None:
        set_num_threads(threads)
    new_tokens = num_tokens + 1 if what == "decode" else 1
    needed = batch * (prompt_tokens + new_tokens)
    if context is not None and context < needed:
        raise GenerationError(f"the bench needs {needed} positions, but --context is {context}.")
    prepared, total_layers = prepare_subject(
        model,
        preset,
        weight_format,
        num_layers,
        gguf,
        plan,
        offline,
        vram=vram,
        context=context or max(DEFAULT_CONTEXT, needed),
    )
    check_context(prepared.config, prompt_tokens + new_tokens)
    check_batch(batch, prepared.plan)
    check_trace(trace, what, prepared.plan)
    if save_expert_profile is not None:
        check_profile_use(prepared.plan, "--save-expert-profile")
        check_profile_target(save_expert_profile, "--save-expert-profile")
    check_deferral(prepared.plan, defer_experts)
    bandwidth = read_bandwidth(detect_hardware().probe_bytes).median  # before the weights fill the memory
    vram_bandwidth = vram_rate() if prepared.plan.uses_gpu else 0.0
    loaded = load(prepared, progress=progress, expert_profile=expert_profile, defer_experts=defer_experts)
    bench = _timed_runs(loaded, what, prompt_tokens, new_tokens, batch)
    warmed_up = _warm_up(bench)
    runs = tuple(bench.run() for _ in range(repeat))
    if trace is not None and not isinstance(bench, TimedRuns):
        from moesaic.engine.gpu.trace import write_trace

        write_trace(bench, trace)
    if save_expert_profile is not None:
        loaded.save_expert_profile(save_expert_profile)
    name = preset or str(model)
    return _result(
        prepared,
        bench,
        runs,
        warmed_up,
        model=name,
        total_layers=total_layers,
        bandwidth=bandwidth,
        vram_bandwidth=vram_bandwidth,
    )


def vram_rate() -> float:
    """GB/s that the GPU reads from its memory; 0 where PyTorch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    from moesaic.engine.gpu.timed_runs import vram_bandwidth

    return vram_bandwidth(torch.device("cuda", torch.cuda.current_device())) / _GIGA


def _timed_runs(
    model: PreTrainedModel, what: What, prompt_tokens: int, new_tokens: int, batch: int
) -> TimedRuns | GpuTimedRuns:
    runner = getattr(model, "runner", None)
    if runner is None:
        return TimedRuns(model, what, prompt_tokens, new_tokens)
    from moesaic.engine.gpu.timed_runs import GpuTimedRuns

    return GpuTimedRuns(runner, what, prompt_tokens, new_tokens, batch)


def _warm_up(bench: TimedRuns | GpuTimedRuns) -> WarmUp | None:
    """What comes before the runs that count; what there is to say of it, where something adapts."""
    if isinstance(bench, TimedRuns) or bench.what == "prefill":
        bench.run()
        return None
    from moesaic.engine.gpu.warm_up import warm_up

    return warm_up(bench)


def _result(
    prepared: Prepared,
    bench: TimedRuns | GpuTimedRuns,
    runs: tuple[float, ...],
    warmed_up: WarmUp | None,
    *,
    model: str,
    total_layers: int,
    bandwidth: float,
    vram_bandwidth: float,
) -> BenchResult:
    """Put together what was measured and what follows from it."""
    plan, run_layers = prepared.plan, num_layers_of(prepared)
    rate = statistics.median(runs)
    achieved = python_share = layer_share = gpu = None
    batch = 1
    if isinstance(bench, TimedRuns):
        achieved = rate * plan.bytes_per_token / _GIGA if bench.what == "decode" else None
        python_share, layer_share, whole_share = bench.profile()
        short = bench.short_layers
        extrapolated = _extrapolate(rate, whole_share, run_layers - short, total_layers - short)
    else:
        from moesaic.engine.gpu.bench import gpu_figures

        gpu = gpu_figures(bench.runner, plan, bench, bandwidth, vram_bandwidth, runs, warmed_up)
        batch = bench.batch
        short = bench.short_layers
        extrapolated = _extrapolate(rate, bench.layer_share(), run_layers - short, total_layers - short)
    return BenchResult(
        what=bench.what,
        model=model,
        weight_format=expert_formats(plan),
        num_layers=run_layers,
        total_layers=total_layers,
        isa=active_isa(),
        threads=num_threads(),
        prompt_tokens=bench.prompt_tokens,
        num_tokens=bench.new_tokens - 1,
        runs=runs,
        tokens_per_second=rate,
        nbytes=plan.nbytes,
        bytes_per_token=plan.bytes_per_token,
        read_bandwidth=bandwidth,
        gigabytes_per_second=achieved,
        bandwidth_share=None if achieved is None else achieved / bandwidth,
        python_share=python_share,
        layer_share=layer_share,
        extrapolated_tokens_per_second=extrapolated,
        batch=batch,
        gpu=gpu,
    )


def _extrapolate(rate: float, layer_share: float, run_layers: int, total_layers: int) -> float | None:
    """Tokens per second with all layers, as if each took the mean time of those that were run; None if all were.

    None, too, if there was none of the kind that is repeated.
    """
    if run_layers in (0, total_layers):
        return None
    return rate / (1.0 - layer_share + layer_share * total_layers / run_layers)
