"""The decode speed to expect of a model on this computer, before any weight is loaded, and the fastest paths.

Bytes are the plan's, rates are measured on products of the model's shapes and formats; nothing else enters. Context is
taken to be short: reading a long cache is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moesaic.engine.bench import expert_formats, num_layers_of, prepare_subject
from moesaic.engine.decode_probe import Overhead, Probe, measure_overhead
from moesaic.engine.decode_work import DecodeWork, decode_work
from moesaic.engine.loader import Prepared
from moesaic.errors import PlanError
from moesaic.kernels import active_isa, num_threads, set_num_threads, tiles_from
from moesaic.placement import Plan, Rules, detect_hardware, load_plan
from moesaic.quant import WeightFormat, get_format

__all__ = ["Estimate", "Part", "Products", "divide", "estimate_decode", "fastest_paths"]

_SECONDS = 1.0
_DEMO_SECONDS = 0.1
_GIGA = 1e9
_INSTRUCTIONS = {"amx": "AVX-512 VNNI", "avx512": "AVX-512 VNNI", "avxvnni": "AVX-VNNI", "avx2": "AVX2"}


class Products(Protocol):
    """What measures the products of a step (`decode_probe.Probe`)."""

    def products(self, work: DecodeWork) -> tuple[float, float, float]:
        """Seconds of experts, of other matrices of the layers, and of matrices outside."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a decode step.

    Attributes:
        name: "experts", "attention and others" or "overhead".
        bytes_per_token: bytes of weights that it reads, from the plan.
        seconds: time that it takes.
        gigabytes_per_second: the one over the other; None where nothing is read.
        bandwidth_share: of that in the measured read bandwidth.
    """

    name: str
    bytes_per_token: int
    seconds: float
    gigabytes_per_second: float | None
    bandwidth_share: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect.

    Attributes:
        model: preset or MODEL.
        weight_format: format(s) of the experts.
        num_layers: layers that are estimated.
        total_layers: layers of the real model.
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
) -> Estimate:
    """Measure the parts of a model's decode step and add them up; no weight of the model is read.

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

    Raises:
        ConfigError: an unknown preset, or more layers than it has.
        UnsupportedFormatError: rows of the model are no whole number of the format's blocks.
        ModelNotFoundError: there is no such model.
        CheckpointError: a file of it is damaged.
        PlanError: the plan uses a GPU.
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
    work = decode_work(prepared)
    probe = Probe(hardware.cold_bytes, _SECONDS)
    parts = divide(work, probe, measure_overhead(work.vocab_size, _DEMO_SECONDS), bandwidth)
    return _estimate(prepared, preset or str(model), total_layers, parts)


def divide(work: DecodeWork, products: Products, overhead: Overhead, bandwidth: float) -> tuple[Part, ...]:
    """The parts of a decode step: experts, attention and other matrices, and what is no product."""
    experts, others, outside = products.products(work)
    rest = overhead.per_layer * work.num_layers + overhead.per_token
    other_bytes = work.bytes_per_token - work.expert_bytes
    return (
        _part("experts", work.expert_bytes, experts, bandwidth),
        _part("attention and others", other_bytes, others + outside, bandwidth),
        Part("overhead", 0, rest, None, None),
    )


def _part(name: str, num_bytes: int, seconds: float, bandwidth: float) -> Part:
    rate = num_bytes / seconds / _GIGA if seconds > 0 else None
    return Part(name, num_bytes, seconds, rate, None if rate is None else rate / bandwidth)


def _estimate(prepared: Prepared, model: str, total_layers: int, parts: tuple[Part, ...]) -> Estimate:
    decode, prefill = fastest_paths(prepared.plan)
    return Estimate(
        model=model,
        weight_format=expert_formats(prepared.plan),
        num_layers=num_layers_of(prepared),
        total_layers=total_layers,
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
