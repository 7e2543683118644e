"""What the expert cache gains on a GPU with a skewed router, and that it never costs more than 3% of a step.

    python benchmarks/expert_cache_gpu.py --out DIR [--subject qwen3-30b-a3b:Q4_K] [--parts gain,promise]
        [--exponents 0.8,1.0,1.2] [--vram 24GiB] [--budget 240]

The logits of a synthetic model's routers are replaced, inside the graph, by Zipf log-probabilities with Gumbel noise
(`zipf_routers`), so that every token chooses experts at random, some of them often. DeepSeek's choice of groups makes
that flatter, so its best hit rate is an upper bound only; the hit rate printed is the measured one.

Steps with the cache and without are those of one sequence, in turns of a few steps (`paired_turns`: ratios, intervals,
and what "kept", "broken" and "undecided" mean). The cache sees its own steps only, as if no others were between them.
Copies that steps with it began end before steps without are timed. Each row has its share of the time that is left, or
less if `--half-width` is reached.

`gain`: caches of 3, 6, 12 and 25% of the experts. Their slots are filled with the experts that the routers choose most,
as by `--expert-profile` with a profile that is exact; from then on the cache does what it does. "best" is the hit rate
of the slots that hold those experts for ever: what a cache can hope for here.

`promise`: where the cache can do little but harm: slots for 1% of the experts, a router without favourites, and an
eager policy that copies as much as its budget of bytes allows; over the link as it is, over a slow one pretended (after
each copy, the stream of copies is kept busy for nine times as long) and over one where each copy is made four times
(which takes DRAM from the CPU as well: worse than any slow link); and with one thread on the CPU. Promised is a ratio
of at least 0.97.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_ways import PROFILE_TOKENS, CacheWays
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu import expert_cache
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.loader import load
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kernels import num_threads, set_num_threads
from moesaic.placement.units import parse_size
from paired_turns import judge, take_turns
from routing import chosen_shares, zipf_log_probabilities
from zipf_routers import ZipfRouters

SIZES = (0.03, 0.06, 0.12, 0.25)
PROMISE = 0.97
BLOCK = 4  # steps; the cache is asked every eight of its own, so that each turn has a question and its copies
ROW_SECONDS = 2.0  # a cache, a graph, and steps that do not count
PROMISE_CASES = (
    ("real", 0, False), ("real", 0, True), ("slow", 0, True), ("fourfold", 0, True), ("slow", 0, False),
    ("fourfold", 0, False), ("real", 1, False), ("slow", 1, True),
)  # fmt: skip
"""Link, threads (0: all), and whether the policy is eager."""
Row = dict[str, Any]


class Options:
    """How precise rows are to be, and how long they may take.

    Args:
        half_width: of the interval of the median that is narrow enough.
        until: end of all rows, by the clock.
        clock: seconds from any start.
    """

    def __init__(self, half_width: float, until: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.half_width, self._until, self._clock = half_width, until, clock

    def left(self) -> float:
        """Seconds."""
        return self._until - self._clock()

    def share(self, rows: int) -> float:
        """Seconds for the turns of the next of so many rows, beside what it takes to begin one."""
        return self.left() / rows - ROW_SECONDS


def compare(ways: CacheWays, half_width: float, seconds: float) -> Row:
    """Turns, and what they say."""
    ways.warm_up()
    turns = take_turns(ways, BLOCK, half_width, seconds)
    finding = judge(turns)
    row: Row = {"verdict": finding.verdict(PROMISE)} | asdict(finding) | ways.counts()
    row["without_ms"] = [round(turn.without * 1e3, 4) for turn in turns]
    row["with_ms"] = [round(turn.own * 1e3, 4) for turn in turns]
    return row


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


def gain(ways: CacheWays, routers: ZipfRouters, exponents: list[float], options: Options) -> Iterator[Row]:
    """Sizes and exponents."""
    routed, top_k = ways.runner.decoder.routed, ways.runner.decoder.top_k
    shape = len(routed), max(experts.num_experts for experts in routed)
    for number, exponent in enumerate(exponents):
        routers.set_exponent(exponent)
        shares = chosen_shares(zipf_log_probabilities(*shape, exponent), top_k)
        best = np.sort(shares, axis=None)[::-1].cumsum() / (len(routed) * top_k)
        for index, size in enumerate(SIZES):
            row: Row = {"part": "gain", "exponent": exponent, "size": size}
            slots = max(1, round(size * shares.size))
            seconds = options.share(len(SIZES) * (len(exponents) - number) - index)
            if seconds <= 0:
                yield row | {"problem": "not run: no time left"}
                continue
            ways.set_cache(slots, profile=np.rint(shares * PROFILE_TOKENS).astype(np.int64))
            yield row | {"best": float(best[slots - 1])} | compare(ways, options.half_width, seconds)


def promise(ways: CacheWays, routers: ZipfRouters, options: Options) -> Iterator[Row]:
    """Where the cache can only harm."""
    routed = ways.runner.decoder.routed
    shape = len(routed), max(experts.num_experts for experts in routed)
    slots = max(8, round(0.01 * sum(experts.num_experts for experts in routed)))
    routers.set_exponent(0.0)
    all_threads = num_threads()
    for index, (kind, few, eager) in enumerate(PROMISE_CASES):
        threads = few or all_threads
        row: Row = {"part": "promise", "link": kind, "threads": threads, "eager": eager}
        seconds = options.share(len(PROMISE_CASES) - index)
        if seconds <= 0:
            yield row | {"problem": "not run: no time left"}
            continue
        # An eager policy takes every chance: a use outside is enough, so it always copies what its budget allows.
        ways.set_cache(slots, PromotionPolicy(*shape, slots, **({"advantage": -1e9} if eager else {})))
        copy_seconds = measure_copy(ways.cache)
        with link(kind):
            set_num_threads(threads)
            try:
                found = compare(ways, options.half_width, seconds)
            finally:
                set_num_threads(all_threads)
        yield row | {"copy_us": copy_seconds * 1e6} | found


def line(row: Row) -> str:
    """A row of the table."""
    if row["part"] == "gain":
        head = f"| Zipf {row['exponent']:g} | {row['size']:.0%}"
    else:
        head = f"| {'eager' if row['eager'] else 'usual'} policy, {row['link']} link | {row['threads']} threads"
    if "problem" in row:
        return f"{head} | {row['problem']} | | | | | | | |"
    best = f" of {row['best']:.1%}" if "best" in row else ""
    rates = (f"{len(row[name]) * 1e3 / sum(row[name]):.2f}" for name in ("without_ms", "with_ms"))
    verdict = f"{row['verdict']}, " if row["part"] == "promise" else ""
    return (
        f"{head} | {row['held']} of {row['slots']} | {row['hit_rate']:.1%}{best} | {row['copies_per_token']:.2f} | "
        f"{' | '.join(rates)} | {row['ratio']:.3f} ({_interval(row['low'], row['high'])}) | "
        f"{row['whole']:.3f} ({_interval(row['whole_low'], row['whole_high'])}) | {verdict}{row['turns']} turns |"
    )


def _interval(low: float, high: float) -> str:
    return f"{low:.3f}-{high:.3f}" if math.isfinite(low) else "too few turns"


HEAD = (
    "| what | size or threads | held | hits | copies per token | tok/s without | with | ratio, median "
    "| of all time | |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Build the model, measure, store, print."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--subject", default="qwen3-30b-a3b:Q4_K", help="MODEL:FORMAT[:LAYERS]")
    parser.add_argument("--parts", default="gain,promise")
    parser.add_argument("--exponents", default="0.8,1.0,1.2")
    parser.add_argument("--half-width", type=float, default=0.0075, help="of a ratio's interval, that is narrow enough")
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
    routers = ZipfRouters(runner)
    ways, options = CacheWays(runner), Options(arguments.half_width, started + arguments.budget)
    num_all = sum(experts.num_experts for experts in runner.decoder.routed)
    rows: list[Row] = []
    print(
        f"{arguments.subject}: {num_all} experts, {torch.cuda.get_device_name()}, built: {options.left():.0f} s left",
        flush=True,
    )
    print(HEAD)
    parts = {
        "promise": lambda: promise(ways, routers, options),
        "gain": lambda: gain(ways, routers, [float(x) for x in arguments.exponents.split(",")], options),
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
