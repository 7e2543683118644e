"""Whether a long prompt finds the VRAM that it needs behind decode and shorter prompts, on one GPU and the DRAM.

    python benchmarks/long_after_short.py [--model qwen3-30b-a3b] [--format Q4_K] [--layers 48] [--vram 24GiB]
        [--prompts 512,2048,8192,8192] [--repeat 2] [--take MIB] [--never-emptied]

Random weights and tokens, one process. Without a cache of experts and then with it: decode, then prompts in the order
given. For each: tokens per second of all its runs, pieces that found too little VRAM meanwhile and the tokens that a
piece has now (`all` if nothing was learnt), and what PyTorch's allocator says. Where it refuses, the segments that are
partly used in that moment, the largest first, with what lies in them. `--take MIB` takes so much VRAM away from the
first row of a long prompt on, so that it is cut, and gives it back in front of the third, so that pieces can grow again
(`--take 400 --prompts 512,2048,8192,8192,8192,8192 --repeat 4` shows both).
`--never-emptied` keeps the allocator as it is in front of long prompts, for comparison. PyTorch's other way to manage
memory needs no option: `PYTORCH_ALLOC_CONF=expandable_segments:True python benchmarks/long_after_short.py`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from gpu_parts import GIB
from gpu_prefill import load_model
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.presets import get_preset
from moesaic.errors import VramError

MIB = 1 << 20


class Watch:
    """What the allocator does from one row to the next, and what it holds when it refuses."""

    KEYS = ("num_alloc_retries", "num_ooms", "num_device_alloc", "num_device_free")

    def __init__(self) -> None:
        self._before = dict.fromkeys(self.KEYS, 0)
        self._refusals = list[str]()
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
        if attach is None:
            print("this PyTorch does not tell when it has no memory: segments are not shown")
        else:
            attach(self._refused)

    def _refused(self, device: int, wanted: int, card_used: int, card_free: int) -> None:
        parts = sorted(partly_used(torch.cuda.memory_snapshot()), key=lambda part: -part[0])
        unused = sum(part[0] for part in parts)
        lines = [f"    refused {wanted / MIB:.0f} MiB; {unused / MIB:.0f} MiB unused in {len(parts)} segments:"]
        lines += [f"      {text}" for _, text in parts[:6]]
        self._refusals.append("\n".join(lines))

    def lines(self) -> Iterator[str]:
        """Since the last call."""
        stats = torch.cuda.memory_stats()
        new = {key: stats.get(key, 0) - self._before[key] for key in self.KEYS}
        self._before = {key: stats.get(key, 0) for key in self.KEYS}
        sizes = [("in use", "allocated_bytes"), ("reserved", "reserved_bytes"), ("in pieces", "inactive_split_bytes")]
        held = (f"{name} {stats[key + '.all.current'] / MIB:.0f} MiB" for name, key in sizes)
        peak = stats["reserved_bytes.all.peak"] / MIB
        counts = ", ".join(f"{key.removeprefix('num_')} {count}" for key, count in new.items())
        yield f"    allocator: {', '.join(held)}, at most {peak:.0f} MiB reserved; {counts}"
        refusals, self._refusals = self._refusals, []
        yield from refusals[:2]
        torch.cuda.reset_peak_memory_stats()


def partly_used(segments: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Of each segment that is used in part, bytes that are not, and what it looks like."""
    for segment in segments:
        unused = segment["total_size"] - segment["allocated_size"]
        if not segment["allocated_size"] or unused < MIB:
            continue
        blocks = [
            f"{block['size'] / MIB:.1f}" + ("" if block["state"] == "inactive" else f" {block['state']}")
            for block in segment["blocks"]
            if block["size"] >= MIB // 2
        ]
        pool = segment.get("segment_pool_id", (0, 0))
        yield unused, f"{segment['total_size'] / MIB:.0f} MiB, pool {pool}: {' | '.join(blocks[:12])}"


class Thief:
    """Takes VRAM away from the allocator's part, as somebody else might, and gives it back.

    Args:
        mib: so much.
    """

    def __init__(self, mib: int) -> None:
        self._mib, self._long = mib, 0
        self._taken: torch.Tensor | None = None

    def before(self, runner: ModelRunner, length: int) -> None:
        """A prompt is about to run."""
        if not self._mib or length <= 4096:
            return
        self._long += 1
        if self._long == 1:
            self._taken = torch.empty(self._mib * MIB, dtype=torch.uint8, device=runner.decoder.device)
            print(f"  {self._mib} MiB are taken", flush=True)
        elif self._long == 3:
            self._taken = None
            torch.cuda.empty_cache()
            print(f"  {self._mib} MiB are given back", flush=True)


def measure(runner: ModelRunner, what: Any, count: int, repeat: int, watch: Watch) -> None:
    """Print a row."""
    bench = GpuTimedRuns(runner, what, *((16, count + 1) if what == "decode" else (count, 1)))
    failures, runs, began = runner.chunk_limit.failures, list[str](), time.perf_counter()
    for _ in range(repeat):
        try:
            runs.append(f"{bench.run():.0f}")
        except VramError as error:
            runs.append(f"({error})")
    cut, size = runner.chunk_limit.failures - failures, runner.chunk_limit.size
    print(f"  {what} {count}: {', '.join(runs)} tok/s; {cut} pieces failed, size now {size or 'all'}", end="")
    print(f" ({time.perf_counter() - began:.1f} s)")
    print("\n".join(watch.lines()), flush=True)


def main() -> None:
    """Parse, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--format", default="Q4_K")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument("--prompts", default="512,2048,8192,8192")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--take", type=int, default=0)
    parser.add_argument("--never-emptied", action="store_true")
    arguments = parser.parse_args()
    began, prompts = time.perf_counter(), [int(part) for part in arguments.prompts.split(",")]
    layers = min(arguments.layers, get_preset(arguments.model).num_layers)
    runner: ModelRunner = load_model(arguments, layers, max(prompts) + 64)[0].runner
    conf = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    lots = None if runner.lending is None else runner.lending.lots
    print(f"chunks of up to {runner.options.max_chunk} tokens; allocator: {conf or 'its usual way'}; lots: {lots}")
    if arguments.never_emptied:
        torch.cuda.empty_cache = lambda: None
    total = torch.cuda.get_device_properties(runner.decoder.device).total_memory
    print(f"the allocator's part: {torch.cuda.get_per_process_memory_fraction() * total / GIB:.2f} GiB", flush=True)
    watch, thief, slots, uploads = Watch(), Thief(arguments.take), runner.slots, runner.uploads
    for with_cache in (False, True):
        print("with a cache of experts:" if with_cache else "without a cache of experts:")
        runner.steps.slots = slots if with_cache else ExpertSlots()
        runner.steps.uploads = uploads if with_cache else None
        measure(runner, "decode", arguments.tokens, arguments.repeat, watch)
        for length in prompts:
            thief.before(runner, length)
            measure(runner, "prefill", length, arguments.repeat, watch)
    print(f"all in all {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
