"""The decode speed to expect of a model on this computer, before any weight is loaded, and the fastest paths.

What is measured is decode itself, of a few layers of the model's shapes and formats with random weights; what is
calculated is how long all layers take, by the bytes that a token reads of them. Context is taken to be short: reading a
long cache is not part of it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from moesaic.engine.layer_sample import choose_layers, layer_costs, take_layers
from moesaic.engine.loader import Prepared, load
from moesaic.engine.packing import Progress
from moesaic.engine.subjects import expert_formats, num_layers_of, prepare_subject
from moesaic.engine.timed_runs import TimedRuns
from moesaic.errors import PlanError
from moesaic.kernels import active_isa, num_threads, set_num_threads, tiles_from
from moesaic.placement import Hardware, Plan, Rules, detect_hardware, load_plan
from moesaic.quant import WeightFormat, get_format

__all__ = ["DecodeTime", "Estimate", "Part", "divide", "estimate_decode", "fastest_paths", "measure_decode"]

_PROMPT_TOKENS, _NEW_TOKENS = 16, 33  # as `moesaic bench decode`
_RUNS = 5
_CACHES = 2  # a token reads at least half of `cold_bytes`: four times the last-level caches
_MEMORY_SHARE = 4
_MAX_BYTES = 24 << 30  # filled in a few seconds by as many threads as have caches that ask for it
_GIGA = 1e9
_INSTRUCTIONS = {
    "amx": "AVX-512 VNNI",
    "avx512_vbmi": "AVX-512 VNNI",
    "avx512": "AVX-512 VNNI",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2",
}


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """What a decode step of a few layers takes.

    Attributes:
        sampled_layers: layers that ran.
        sampled_bytes: bytes of weights that a token reads in them.
        all_bytes: bytes of weights that a token reads in all layers of the model.
        in_layers: seconds of a step inside the layers.
        outside: seconds of it outside: embedding, head, choice of the token, and what Python takes.
    """

    sampled_layers: int
    sampled_bytes: int
    all_bytes: int
    in_layers: float
    outside: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a decode step.

    Attributes:
        name: "layers" or "head and others".
        bytes_per_token: bytes of weights that it reads, from the plan.
        seconds: time that it takes.
        gigabytes_per_second: the one over the other.
        bandwidth_share: of that in the measured read bandwidth.
    """

    name: str
    bytes_per_token: int
    seconds: float
    gigabytes_per_second: float
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect.

    Attributes:
        model: preset or MODEL.
        weight_format: format(s) of the experts.
        num_layers: layers that are estimated.
        total_layers: layers of the real model.
        sampled_layers: layers that were run to estimate it.
        isa: instruction set of the kernels.
        threads: worker threads.
        decode_path: what multiplies one token, in words.
        prefill_path: what multiplies many tokens, in words.
        bytes_per_token: bytes of weights that a token reads, from the plan.
        parts: what a step consists of.
        tokens_per_second: of decode at a short context.
    """

    model: str
    weight_format: str
    num_layers: int
    total_layers: int
    sampled_layers: int
    isa: str
    threads: int
    decode_path: str
    prefill_path: str
    bytes_per_token: int
    parts: tuple[Part, ...]
    tokens_per_second: float


def estimate_decode(
    bandwidth: float,
    *,
    model: str | None = None,
    preset: str | None = None,
    weight_format: str = "Q4_K",
    num_layers: int | None = None,
    threads: int | None = None,
    gguf: str | None = None,
    plan: str | Rules = "auto",
    offline: bool = False,
    progress: Progress = False,
) -> Estimate:
    """Time decode with a few layers and calculate it for all; no weight of the model is read.

    Args:
        bandwidth: measured read bandwidth in GB/s, which the parts' rates are compared with.
        model: MODEL as for `AutoModelForCausalLM.from_pretrained`; or
        preset: name of one of `presets.PRESETS`.
        weight_format: of a synthetic model's matrices.
        num_layers: layers of a synthetic model; all if None.
        threads: worker threads; the default if None.
        gguf: as for `from_pretrained`.
        plan: a template, a file or rules that place nothing on a GPU; `auto` is taken as on a computer without one.
        offline: as for `from_pretrained`.
        progress: as for `from_pretrained`, of making the random weights.

    Raises:
        ConfigError: an unknown preset, or more layers than it has.
        UnsupportedFormatError: rows of the model are no whole number of the format's blocks.
        ModelNotFoundError: there is no such model.
        CheckpointError: a file of it is damaged.
        PlanError: the plan uses a GPU.
        PlanDoesNotFitError: not even one layer fits in memory.
    """
    if threads is not None:
        set_num_threads(threads)
    rules = plan if isinstance(plan, Rules) else load_plan(plan)
    hardware = detect_hardware()  # without GPUs: what is estimated is the CPU
    if rules.needs_gpu:
        raise PlanError(
            f"plan '{rules.name}' uses a GPU, but decode speed is estimated for the CPU alone: leave --plan out, or "
            "see the bound that 'moesaic plan --bandwidth' prints."
        )
    prepared, total_layers = prepare_subject(
        model, preset, weight_format, num_layers, gguf, rules, offline, hardware=hardware
    )
    prepared.checkpoint.close()
    time = measure_decode(prepared, hardware, progress=progress)
    return _estimate(prepared, preset or str(model), total_layers, time, divide(prepared.plan, time, bandwidth))


def measure_decode(
    prepared: Prepared, hardware: Hardware, *, runs: int = _RUNS, progress: Progress = False
) -> DecodeTime:
    """Time decode with as many of a model's layers as it takes to read weights from DRAM.

    Args:
        prepared: the model, of which nothing is read.
        hardware: this computer.
        runs: of which the median counts; a shorter one before them warms up.
        progress: of making the random weights.

    Raises:
        PlanDoesNotFitError: not even one layer fits in memory.
    """
    costs = layer_costs(prepared)
    room = min(_MAX_BYTES, hardware.dram_available // _MEMORY_SHARE)
    chosen = choose_layers(costs, hardware.cold_bytes // _CACHES, room)
    bench = TimedRuns(load(take_layers(prepared, chosen), progress=progress), "decode", _PROMPT_TOKENS, _NEW_TOKENS)
    bench.run()
    step = 1 / statistics.median(bench.run() for _ in range(runs))
    _, layer_share, _ = bench.profile()
    sampled, all_bytes = (sum(cost.bytes_per_token for cost in part) for part in ([costs[i] for i in chosen], costs))
    return DecodeTime(len(chosen), sampled, all_bytes, step * layer_share, step * (1 - layer_share))


def divide(plan: Plan, time: DecodeTime, bandwidth: float) -> tuple[Part, ...]:
    """The parts of a decode step with all layers: the layers, and what is outside them."""
    in_layers = time.in_layers * time.all_bytes / time.sampled_bytes
    return (
        _part("layers", time.all_bytes, in_layers, bandwidth),
        _part("head and others", plan.bytes_per_token - time.all_bytes, time.outside, bandwidth),
    )


def _part(name: str, num_bytes: int, seconds: float, bandwidth: float) -> Part:
    rate = num_bytes / seconds / _GIGA
    return Part(name, num_bytes, seconds, rate, rate / bandwidth)


def _estimate(prepared: Prepared, model: str, total_layers: int, time: DecodeTime, parts: tuple[Part, ...]) -> Estimate:
    decode, prefill = fastest_paths(prepared.plan)
    return Estimate(
        model=model,
        weight_format=expert_formats(prepared.plan),
        num_layers=num_layers_of(prepared),
        total_layers=total_layers,
        sampled_layers=time.sampled_layers,
        isa=active_isa(),
        threads=num_threads(),
        decode_path=decode,
        prefill_path=prefill,
        bytes_per_token=prepared.plan.bytes_per_token,
        parts=parts,
        tokens_per_second=1 / sum(part.seconds for part in parts),
    )


def fastest_paths(plan: Plan) -> tuple[str, str]:
    """What multiplies one token with the experts, and what many tokens, per format if that differs."""
    formats = [get_format(name) for name in expert_formats(plan).split(", ")]
    return _by_format(formats, [_decode_path(fmt) for fmt in formats]), _by_format(
        formats, [_prefill_path(fmt) for fmt in formats]
    )


def _by_format(formats: list[WeightFormat], paths: list[str]) -> str:
    if len(set(paths)) == 1:
        return paths[0]
    return "; ".join(f"{fmt.name}: {path}" for fmt, path in zip(formats, paths, strict=True))


def _decode_path(fmt: WeightFormat) -> str:
    isa = active_isa()
    instructions = "portable code" if isa == "generic" else _INSTRUCTIONS.get(isa, isa)
    if not fmt.rounds_activations:
        return f"{instructions.removesuffix(' VNNI')}, multiply-adds of float32"
    return f"{instructions}, dot products of int8"


def _prefill_path(fmt: WeightFormat) -> str:
    tokens = tiles_from(fmt.ggml_type)
    if tokens is None:
        return _decode_path(fmt)
    return f"AMX, tiles of bfloat16 from {tokens} tokens of an expert on, below that {_decode_path(fmt)}"
