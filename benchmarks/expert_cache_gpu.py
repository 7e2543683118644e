"""What the expert cache gains on a GPU with a skewed router, and that it never costs more than 3% of a step.

    python benchmarks/expert_cache_gpu.py --out DIR [--subject qwen3-30b-a3b:Q4_K] [--parts gain,promise]
        [--exponents 0.8,1.0,1.2] [--vram 24GiB] [--budget 240]

The logits of a synthetic model's routers are replaced, inside the graph, by Zipf log-probabilities with Gumbel noise
(`zipf_routers`), so that every token chooses experts at random, some of them often. DeepSeek's choice of groups makes
that flatter; the hit rate printed is the measured one.

`gain`: decode with caches of 3, 6, 12 and 25% of the experts, filled first, against decode without, measured in turns.

`promise`: steps with the cache against steps without, in turns, where the cache can do little but harm: slots for 1% of
the experts, a router without favourites, and an eager policy that copies as much as its budget of bytes allows; over
the link as it is, over a slow one pretended (after each copy, the stream of copies is kept busy for nine times as long)
and over one where each copy is made four times (which takes DRAM from the CPU as well: worse than any slow link); and
with one thread on the CPU. A ratio below 0.97 is a promise broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moesaic.engine.bench import prepare_synthetic
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu import expert_cache
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.loader import load
from moesaic.kernels import num_threads, set_num_threads
from moesaic.placement.units import parse_size
from zipf_routers import ZipfRouters

SIZES = (0.03, 0.06, 0.12, 0.25)
PROMISE = 0.97
TURNS = 5
Row = dict[str, Any]


class Turns:
    """Decodes with and without a cache on one runner, in turns."""

    def __init__(self, runner: ModelRunner, tokens: int) -> None:
        self.runner, self.tokens = runner, tokens
        self._ways: dict[str, tuple[ExpertSlots, dict[int, Any]]] = {"off": (ExpertSlots(), {})}
        self.cache: ExpertCache | None = None

    def set_cache(self, num_slots: int, policy: PromotionPolicy | None = None) -> None:
        """A new, empty cache."""
        self._ways.pop("on", None)
        self.runner.steps.slots, self.runner.steps.buckets = self._ways["off"]
        self.cache = None
        torch.cuda.empty_cache()
        decoder = self.runner.decoder
        self.cache = ExpertCache(decoder.routed, num_slots, decoder.device, policy)
        self.runner.server.uses.zero_()
        self._ways["on"] = (ExpertSlots(cache=self.cache), {})

    def rate(self, way: str) -> float:
        """Tokens per second."""
        self.runner.steps.slots, self.runner.steps.buckets = self._ways[way]
        if way == "on":
            # What was chosen without the cache is none of its business.
            self.cache._seen[:] = self.runner.server.uses.numpy().view("uint32")
        return GpuTimedRuns(self.runner, "decode", 4, self.tokens + 1).run()

    def fill(self, seconds: float) -> None:
        """Decode until the slots are taken, or for so long."""
        ends = time.monotonic() + seconds
        self.rate("on")
        while time.monotonic() < ends and self.cache.statistics().num_held < self.cache.policy.num_slots:
            self.rate("on")

    def compare(self, turns: int = TURNS) -> Row:
        """Medians of both, and their ratio."""
        for way in ("off", "on"):
            self.rate(way)
        policy, before = self.cache.policy, self.cache.statistics().copied
        hits, uses = int(policy.hits.sum()), int(policy.uses.sum())
        off, on = [], []
        for _ in range(turns):
            off.append(self.rate("off"))
            on.append(self.rate("on"))
        counted = int(policy.uses.sum()) - uses
        return {
            "slots": policy.num_slots,
            "held": self.cache.statistics().num_held,
            "hit_rate": (int(policy.hits.sum()) - hits) / counted if counted else 0.0,
            "copies_per_token": (self.cache.statistics().copied - before) / (turns * self.tokens),
            "off": off,
            "on": on,
            "ratio": statistics.median(on) / statistics.median(off),
            "pairs": [b / a for a, b in zip(off, on, strict=True)],
        }


@contextmanager
def link(kind: str) -> Iterator[None]:
    """Copies of the cache over the link as it is, over one ten times as slow, or each made four times."""
    real = expert_cache.copy_experts

    def slow(*arguments: Any) -> None:
        real(*arguments)
        torch.cuda._sleep(slow_cycles)

    def fourfold(*arguments: Any) -> None:
        for _ in range(4):
            real(*arguments)

    slow_cycles = 9 * _COPY_CYCLES[0]
    expert_cache.copy_experts = {"real": real, "slow": slow, "fourfold": fourfold}[kind]
    try:
        yield
    finally:
        expert_cache.copy_experts = real


_COPY_CYCLES = [0]


def measure_copy(cache: ExpertCache) -> float:
    """Seconds that the copy of an expert takes; sets how long a slow link keeps the stream busy."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(8):
        expert_cache.copy_experts(cache._routed[0], 0, 1, cache._layouts[0], cache.arena, 0)
    end.record()
    end.synchronize()
    seconds = begin.elapsed_time(end) / 8e3
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    _COPY_CYCLES[0] = round(seconds / (begin.elapsed_time(end) / 1e3) * 10_000_000)
    return seconds


def gain(turns: Turns, routers: ZipfRouters, exponents: list[float], left: Callable[[], float]) -> Iterator[Row]:
    """Sizes and exponents."""
    routed = turns.runner.decoder.routed
    num_all = sum(experts.num_experts for experts in routed)
    for exponent in exponents:
        routers.set_exponent(exponent)
        for size in SIZES:
            if left() < 10:
                yield {"part": "gain", "exponent": exponent, "size": size, "problem": "not run: no time left"}
                continue
            turns.set_cache(max(1, round(size * num_all)))
            turns.fill(6.0)
            yield {"part": "gain", "exponent": exponent, "size": size, **turns.compare(3)}


def promise(turns: Turns, routers: ZipfRouters, slots: int, left: Callable[[], float]) -> Iterator[Row]:
    """Where the cache can only harm."""
    routed = turns.runner.decoder.routed
    shape = len(routed), max(experts.num_experts for experts in routed)
    routers.set_exponent(0.0)
    all_threads = num_threads()
    for kind, threads, eager in (
        ("real", all_threads, False), ("real", all_threads, True), ("slow", all_threads, True),
        ("fourfold", all_threads, True), ("slow", all_threads, False), ("fourfold", all_threads, False),
        ("real", 1, False), ("slow", 1, True),
    ):  # fmt: skip
        row: Row = {"part": "promise", "link": kind, "threads": threads, "eager": eager}
        if left() < 15:
            yield row | {"problem": "not run: no time left"}
            continue
        # An eager policy takes every chance: a use outside is enough, so it always copies what its budget allows.
        turns.set_cache(slots, PromotionPolicy(*shape, slots, **({"advantage": -1e9} if eager else {})))
        copy_seconds, tokens = measure_copy(turns.cache), turns.tokens
        turns.tokens = tokens if threads > 1 else 12
        with link(kind):
            set_num_threads(threads)
            try:
                found = turns.compare(TURNS if threads > 1 else 3)
            finally:
                set_num_threads(all_threads)
        turns.tokens = tokens
        yield row | {"copy_us": copy_seconds * 1e6, "kept": found["ratio"] >= PROMISE} | found


def line(row: Row) -> str:
    """A row of the table."""
    if row["part"] == "gain":
        head = f"| Zipf {row['exponent']:g} | {row['size']:.0%}"
    else:
        head = f"| {'eager' if row['eager'] else 'usual'} policy, {row['link']} link | {row['threads']} threads"
    if "problem" in row:
        return f"{head} | {row['problem']} | | | | | |"
    off, on = row["off"], row["on"]
    return (
        f"{head} | {row['held']} of {row['slots']} | {row['hit_rate']:.1%} | {row['copies_per_token']:.2f} | "
        f"{statistics.median(off):.2f} ({min(off):.2f}-{max(off):.2f}) | {statistics.median(on):.2f} "
        f"({min(on):.2f}-{max(on):.2f}) | {row['ratio']:.3f} |"
    )


HEAD = (
    "| what | size or threads | held | hits | copies per token | tok/s without | with | ratio |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Build the model, measure, store, print."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--subject", default="qwen3-30b-a3b:Q4_K", help="MODEL:FORMAT[:LAYERS]")
    parser.add_argument("--parts", default="gain,promise")
    parser.add_argument("--exponents", default="0.8,1.0,1.2")
    parser.add_argument("--tokens", type=int, default=32, help="to decode in a run")
    parser.add_argument("--vram", type=parse_size, default=24 * 2**30)
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model_name, weight_format, *layers = arguments.subject.split(":")
    prepared = prepare_synthetic(
        model_name, FormatMix.parse(weight_format), int(layers[0]) if layers else None, "hybrid", vram=arguments.vram
    )
    model: Any = load(prepared, progress=False, lends=False)  # caches of several sizes are made beside it
    runner: ModelRunner = model.runner
    runner.steps.slots = ExpertSlots()  # the cache of the plan gives its VRAM to those that are tried
    runner.steps.uploads = None  # what a cache does by itself
    turns, routers = Turns(runner, arguments.tokens), ZipfRouters(runner)
    num_all = sum(experts.num_experts for experts in runner.decoder.routed)
    slots = max(8, round(0.01 * num_all))
    rows: list[Row] = []

    def left() -> float:
        return arguments.budget - (time.monotonic() - started)

    print(
        f"{arguments.subject}: {num_all} experts, {torch.cuda.get_device_name()}, built: {left():.0f} s left",
        flush=True,
    )
    print(HEAD)
    parts = {
        "promise": lambda: promise(turns, routers, slots, left),
        "gain": lambda: gain(turns, routers, [float(x) for x in arguments.exponents.split(",")], left),
    }
    for name, part in parts.items():
        if name not in arguments.parts.split(","):
            continue
        for row in part():
            rows.append(row | {"subject": arguments.subject})
            print(line(row), flush=True)
            with (arguments.out / "expert-cache.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    table = [f"# {arguments.subject}, {torch.cuda.get_device_name()}, {time.strftime('%d %B %Y')}", "", HEAD]
    name = arguments.subject.replace(":", "-")
    (arguments.out / f"expert-cache-{name}.md").write_text("\n".join([*table, *map(line, rows)]) + "\n")


if __name__ == "__main__":
    main()
