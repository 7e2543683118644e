"""`moesaic bench`: how fast this computer decodes or prefills a model, and how near that is to its memory's limit.

Loads of many requests are in `bench_serve`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import bench_serve
from moesaic.cli.options import (
    add_any_model_arguments,
    add_budget_arguments,
    add_deferral_argument,
    add_profile_arguments,
    list_presets,
    plan_of,
    positive_int,
)
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.engine.bench import BenchResult
    from moesaic.engine.gpu.bench import GpuFigures
    from moesaic.engine.gpu.warm_up import WarmUp

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "measure decode, prefill, or many requests at once"
DESCRIPTION = (
    "Measure tokens per second of decode (one token after another) or prefill (a whole prompt), or many requests at "
    "once (serve); on MODEL or on a model of real dimensions with random weights that is built in memory (--synthetic)."
)
_SINGLE = {"decode": "one token after another", "prefill": "a whole prompt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be measured, each with arguments of its own."""
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True, help="what to measure")
    for what, text in _SINGLE.items():
        single = whats.add_parser(what, help=f"tokens per second, {text}", description=DESCRIPTION)
        _add_single_arguments(single)
        if what == "decode":
            add_profile_arguments(single)
            add_deferral_argument(single)
        single.set_defaults(measure=_run_single)
    serve = whats.add_parser("serve", help=bench_serve.HELP, description=bench_serve.DESCRIPTION)
    bench_serve.add_arguments(serve)
    serve.set_defaults(measure=bench_serve.run)
    for each in whats.choices.values():  # it may stand at the end of the line, too
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure what is asked for."""
    return int(arguments.measure(arguments))


def _add_single_arguments(parser: argparse.ArgumentParser) -> None:
    add_any_model_arguments(parser)
    add_budget_arguments(parser)
    parser.add_argument("--tokens", type=positive_int, default=32, metavar="N", help="tokens to decode (32)")
    parser.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="prompt (decode: 16, prefill: 512)")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="sequences at once, on a GPU (1)")
    parser.add_argument("--repeat", type=positive_int, default=3, metavar="N", help="take the median of N runs (3)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="decode on a GPU: write a Chrome trace of a few steps (Perfetto)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _run_single(arguments: argparse.Namespace) -> int:
    """Build or load the model, measure, print."""
    if (arguments.model is None) == (arguments.synthetic is None):
        raise ConfigError("bench needs either MODEL or --synthetic PRESET ('--synthetic list' shows the presets).")
    if arguments.synthetic == "list":
        print(list_presets())
        return 0
    from moesaic.engine.bench import measure

    result = measure(
        arguments.what,
        model=arguments.model,
        preset=arguments.synthetic,
        weight_format=arguments.format,
        num_layers=arguments.layers,
        num_tokens=arguments.tokens,
        prompt_tokens=arguments.prompt_tokens or (16 if arguments.what == "decode" else 512),
        repeat=arguments.repeat,
        threads=arguments.threads,
        gguf=arguments.gguf,
        plan=plan_of(arguments),
        vram=arguments.vram,
        context=arguments.context,
        batch=arguments.batch,
        offline=arguments.offline,
        progress=sys.stderr.isatty(),
        trace=arguments.trace,
        expert_profile=getattr(arguments, "expert_profile", None),
        save_expert_profile=getattr(arguments, "save_expert_profile", None),
        defer_experts=getattr(arguments, "defer_experts", None) or 0,
    )
    print(json.dumps(asdict(result), indent=2) if arguments.json else _render(result))
    return 0


def _gpu_lines(gpu: GpuFigures) -> list[str]:
    lines = [f"plan: {gpu.strategy} on {gpu.device}, {gpu.vram_peak / 2**30:.2f} GiB of VRAM at most"]
    if gpu.warm_up is not None:
        lines.append(_warm_up_line(gpu.warm_up))
    if gpu.num_slots:
        rates = gpu.layer_hit_rates
        spread = f" ({min(rates):.1%} to {max(rates):.1%} by layer)" if rates else ""
        lines.append(f"expert cache: {gpu.num_slots} experts, {gpu.hit_rate:.1%} hits{spread}")
    if gpu.no_uploads:
        lines.append(f"uploads: none, since {gpu.no_uploads}")
    elif gpu.uploads is not None and gpu.upload_share is not None:
        lines.append(
            f"uploads: {gpu.uploads:.2f} missing experts of a layer in a step, {gpu.upload_share:.1%} of the misses"
        )
    if gpu.foretold is not None:
        told = gpu.foretold
        lines.append(
            f"read ahead: {told.read:.2f} experts of a layer while the CPU waited, {told.read_asked:.0%} of them asked "
            f"for; sent ahead: {told.sent:.2f}, {told.sent_asked:.0%}"
        )
    if gpu.deferred:
        lines.append(f"deferral: {gpu.deferred}")
    if gpu.step_seconds is not None and gpu.experts_seconds is not None and gpu.between_seconds is not None:
        lines.append(
            f"a step: {gpu.step_seconds * 1e3:.2f} ms, of which experts on the CPU {gpu.experts_seconds * 1e3:.2f} ms, "
            f"waiting for requests {gpu.between_seconds * 1e3:.2f} ms"
        )
    if gpu.roofline_seconds is not None and gpu.dram_bytes is not None and gpu.vram_bytes is not None:
        by_runs = "" if gpu.runs_roofline_share is None else f"the runs reach {gpu.runs_roofline_share:.0%} and "
        lines.append(
            f"limit: {gpu.roofline_seconds * 1e3:.2f} ms ({gpu.dram_bytes / 1e9:.3f} GB from DRAM beside "
            f"{gpu.vram_bytes / 1e9:.3f} GB from VRAM at {gpu.vram_bandwidth:.0f} GB/s, and hand-offs), of which "
            f"{by_runs}the median step {gpu.roofline_share:.0%}"
        )
    return lines


def _warm_up_line(done: WarmUp) -> str:
    line = f"warm-up: {done.steps} steps in {done.seconds:.1f} s, before the runs, which do not count them"
    return f"{line}; not settled by then: {', '.join(done.unsettled)}" if done.unsettled else line


def _render(result: BenchResult) -> str:
    spread = f"{min(result.runs):.2f} to {max(result.runs):.2f} in {len(result.runs)} runs"
    lines = [
        f"{result.model}, {result.weight_format}, {result.num_layers} of {result.total_layers} layers, "
        f"{result.threads} threads, {result.isa}",
        f"{result.what}: {result.tokens_per_second:.2f} tok/s (median; {spread})",
        f"weights: {result.nbytes / 1e9:.2f} GB, {result.bytes_per_token / 1e9:.3f} GB read per token",
    ]
    if result.gigabytes_per_second is not None:
        lines.append(
            f"read: {result.gigabytes_per_second:.1f} GB/s, {result.bandwidth_share:.0%} of the "
            f"{result.read_bandwidth:.1f} GB/s that this computer reads (median)"
        )
    if result.python_share is not None:
        lines.append(f"outside native calls: {result.python_share:.1%} of the time")
    if result.gpu is not None:
        lines.extend(_gpu_lines(result.gpu))
    if result.extrapolated_tokens_per_second is not None:
        lines.append(
            f"extrapolated (not measured) to all {result.total_layers} layers: "
            f"{result.extrapolated_tokens_per_second:.2f} tok/s"
        )
        if result.gpu is not None and result.gpu.num_slots:
            lines.append(
                "the cache holds a larger share of fewer layers' experts: with all of them there are fewer hits"
            )
    return "\n".join(lines)
