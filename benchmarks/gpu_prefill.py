"""Where the time of a prompt goes on one GPU and the DRAM: the link, the card's kernels, the CPU's experts.

    python benchmarks/gpu_prefill.py [--model qwen3-30b-a3b] [--format Q4_K] [--layers 16] [--vram 24GiB]
        [--lengths 512,2048,8192] [--repeat 3] [--chunk 4096] [--forced] [--cache] [--host]

Random weights and tokens. For each length: tokens per second of some runs, milliseconds a layer (what the whole model
would take follows from it, without embedding and head), who computed how many experts, in how long; then of one more
run under PyTorch's profiler how long copies to the card took all in all, how long kernels ran, the longest of them.
`--forced` adds runs in which the GPU gets all experts, and in which the CPU does. First logits of both are compared.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts import GIB
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu import prefill as prefill_module
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.start import start_on_gpu
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.loader import load, this_computer
from moesaic.engine.presets import get_preset
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kernels.packed import PackedTensor
from moesaic.placement.units import parse_size


class Watch:
    """Notes who gets which experts, and how long the CPU takes for its own; may decide instead of the shares."""

    def __init__(self, runner: Any) -> None:
        self.shares, self.forced = runner.shares, ""
        self.real_choose, self.real_forward = runner.shares.choose, prefill_module.moe_forward
        self.shares.choose = self.choose
        prefill_module.moe_forward = self.forward
        self.reset()

    def reset(self) -> None:
        self.active: list[int] = []
        self.streamed: list[int] = []
        self.ahead: list[int] = []
        self.cpu: list[float] = []

    def choose(self, layer: int, tokens: np.ndarray, num_rows: int, present: np.ndarray, *rest: Any) -> np.ndarray:
        chosen = self.real_choose(layer, tokens, num_rows, present, *rest)
        if self.forced:
            self.shares._last = None  # what was chosen is not what is measured
            chosen = (tokens > 0) if self.forced == "gpu" else present & (tokens > 0)
        self.active.append(int(np.count_nonzero(tokens)))
        self.streamed.append(int(chosen.sum()))
        self.ahead.append(int(present.sum()))
        return chosen

    def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
        started = time.perf_counter()
        result = self.real_forward(*arguments, **options)
        self.cpu.append(time.perf_counter() - started)
        return result

    def line(self, layers: int) -> str:
        passes = max(1, len(self.active) / layers)
        if not self.active:
            return "all experts are in the cache"
        cpu = sum(self.cpu) / passes / layers * 1e3
        return (
            f"experts a layer: {np.mean(self.active):.0f} active, {np.mean(self.streamed):.0f} on the GPU "
            f"({np.mean(self.ahead):.0f} set out before); CPU {cpu:.2f} ms a layer; {self.shares.costs}"
        )


def busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, 0.0
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def take_apart(bench: GpuTimedRuns) -> list[str]:
    """A run under the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        bench.run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    up: list[tuple[float, float]] = []
    kernels: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        first, last = event.time_range.start / 1e6, event.time_range.end / 1e6
        name = event.name[:44]
        (up if "HtoD" in name else kernels if "Memcpy" not in name else []).append((first, last))
        by_name[name].append(last - first)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:9]
    lines = [
        f"profiled {wall * 1e3:.1f} ms: copies up {busy(up) * 1e3:.1f} ms busy, kernels {busy(kernels) * 1e3:.1f} ms"
    ]
    lines += [f"  {sum(times) * 1e3:8.2f} ms {len(times):6} x {name}" for name, times in longest]
    return lines


def host_profile(bench: GpuTimedRuns) -> str:
    """Where Python is during a run; it takes longer than without being looked at."""
    profiler, text = cProfile.Profile(), io.StringIO()
    profiler.runcall(bench.run)
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(32)
    return "\n".join("  " + line[:110] for line in text.getvalue().splitlines() if line.strip())


def load_model(arguments: argparse.Namespace, layers: int, context: int) -> tuple[Any, int]:
    """On the GPU; and bytes of its routed experts."""
    fmt, vram = FormatMix.parse(arguments.format), parse_size(arguments.vram)

    def prepared(plan: str) -> Any:
        chosen = None if plan == "cpu" else vram
        return prepare_synthetic(arguments.model, fmt, layers, plan, vram=chosen, context=context)

    started = time.perf_counter()
    model = load(prepared("cpu"), progress=False)
    plan = prepared("hybrid").plan
    start_on_gpu(model, plan, plan.vram_budget(this_computer(True)))
    nbytes = 0
    for experts in model.runner.decoder.routed:
        parts = [part for part in (experts.gate, experts.up, experts.down) if part is not None]
        nbytes += sum(part.nbytes for part in parts if isinstance(part, PackedTensor))
    took = time.perf_counter() - started
    print(f"{torch.cuda.get_device_name()}: {layers} layers, experts {nbytes / GIB:.2f} GiB, loaded in {took:.0f} s")
    return model, nbytes


def compare(runner: Any, watch: Watch, tokens: int) -> None:
    """Logits with all experts on the GPU against those with all on the CPU, which multiplies with other roundings."""
    found = []
    ids = torch.randint(runner.decoder.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    for forced in ("cpu", "gpu", ""):
        watch.forced = forced
        sequence = runner.new_sequence()
        found.append(runner.prefill([(sequence, ids)]).cpu().double())
        sequence.truncate(0)
    watch.forced = ""
    scale = found[0].abs().max()
    errors = [float((each - found[0]).abs().max() / scale) for each in found[1:]]
    same = [bool(each.argmax() == found[0].argmax()) for each in found[1:]]
    print(f"logits of {tokens} tokens against the CPU's experts: all on the GPU {errors[0]:.2e}, shared out ", end="")
    print(f"{errors[1]:.2e}; same token: {same}", flush=True)


def main() -> None:
    """Parse, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--format", default="Q4_K")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--chunk", type=int, help="tokens at once; as the plan says if not given")
    parser.add_argument("--host", action="store_true", help="what Python does in the meantime (all on the GPU)")
    parser.add_argument("--cache", action="store_true", help="with the expert cache, which begins full")
    parser.add_argument("--forced", action="store_true", help="all on the GPU, all on the CPU too")
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    preset = get_preset(arguments.model)
    layers = min(arguments.layers, preset.num_layers)
    model, nbytes = load_model(arguments, layers, max(lengths) + 64)
    runner = model.runner
    print(
        f"begins with {runner.shares.costs}; staging {runner.staging.num_groups} x {runner.staging.group} experts",
        flush=True,
    )
    if not arguments.cache:
        runner.steps.slots = ExpertSlots()
    watch = Watch(runner)
    compare(runner, watch, min(lengths))
    for length in lengths:
        bench = GpuTimedRuns(runner, "prefill", length, 1, chunk=arguments.chunk)
        for forced in ("", "gpu", "cpu") if arguments.forced else ("",):
            watch.forced = forced
            bench.run()
            watch.reset()
            runs = [bench.run() for _ in range(arguments.repeat)]
            seconds = length / statistics.median(runs)
            passes = -(-length // (arguments.chunk or runner.options.max_chunk))
            whole = length / (seconds / layers * preset.num_layers)
            median, per_layer = statistics.median(runs), seconds / layers / passes * 1e3
            link = nbytes / layers / 54e9 * 1e3
            print(f"{length} tokens {forced or 'shared out'}: {median:.0f} tok/s ({min(runs):.0f} to {max(runs):.0f})")
            print(f"  {per_layer:.2f} ms a layer and chunk (its experts are {link:.2f} ms at 54 GB/s)", end="")
            print(f"; whole model about {whole:.0f} tok/s")
            print("  " + watch.line(layers), flush=True)
        if arguments.host:
            watch.forced = "gpu"
            print(host_profile(bench), flush=True)
        watch.forced = ""
        print("\n".join("  " + line for line in take_apart(bench)), flush=True)


if __name__ == "__main__":
    main()
