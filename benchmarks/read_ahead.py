"""What it gains in decode that routers say, before attention, what they will probably ask the CPU for.

    python benchmarks/read_ahead.py [--subjects deepseek-v3:Q2_K:9,...] [--vram 10GiB] [--shares 0,2] [--seconds 20]

Steps of one sequence with forecasts, which cost the GPU a branch of its graph and let the CPU read into its caches and
send what is surest, and steps without take turns on one runner (`paired_turns`), with a fixed share of the misses, in
eighths, brought to the GPU. "ratio" is the speed with over that without, with its interval; "CPU" is the time in which
a layer's experts are computed, "between" from the answer to the next request, both without and with; then what was
foretold.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import pairwise

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.foretold import foretold_counts
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.gpu.upload_shares import numbers_of
from moesaic.engine.loader import load
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kernels import read_bandwidth
from moesaic.placement.units import parse_size
from paired_turns import judge, take_turns
from timed_decode import DecodeWays, TimedDecode

SUBJECTS = "deepseek-v3:IQ1_S+Q4_K:9,deepseek-v3:Q2_K:6,qwen3-30b-a3b:Q4_K:24"
BLOCK, HALF_WIDTH, STEPS = 4, 0.005, 24


class AheadWays(DecodeWays):
    """Steps with forecasts and without, each with graphs of their own: `Ways`.

    Args:
        runner: of a loaded model.
    """

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(TimedDecode(runner, 1))
        self._runner = runner
        self._buckets = {False: {}, True: {}}
        for is_with in (True, False):
            self.use(is_with)
            runner.steps.bucket(1)

    def use(self, is_with: bool) -> None:
        """From the next step on."""
        self._runner.hand_off.reads_ahead = is_with
        self._runner.steps.buckets = self._buckets[is_with]

    def switch(self, is_with: bool) -> None:
        """As `Ways`."""
        self.use(is_with)
        self.decode.step()


def parts(runner: ModelRunner) -> tuple[float, float]:
    """Microseconds of a layer in which the CPU computes, and between its answer and the next request."""
    steps = GpuTimedRuns(runner, "decode", 16, STEPS + 1).timed_steps(STEPS)
    on_cpu = [done - seen for step in steps for seen, _, done in step.layers]
    between = [after[0] - before[2] for step in steps for before, after in pairwise(step.layers)]
    return statistics.fmean(on_cpu) / 1e3, statistics.fmean(between) / 1e3


def rows(runner: ModelRunner, shares: list[int], seconds: float) -> Iterator[str]:
    """A line for each share of uploads."""
    ways = AheadWays(runner)
    for share in shares if runner.uploads is not None else [0]:
        if runner.uploads is not None:
            landing = runner.uploads.landing
            runner.uploads.fixed = numbers_of(share, landing.max_distinct, landing.num_slots)
        found = judge(take_turns(ways, BLOCK, HALF_WIDTH, seconds))
        figures = []
        for is_with in (False, True):
            ways.use(is_with)
            before = foretold_counts(runner.server, runner.uploads)
            figures.append(parts(runner))
            told = foretold_counts(runner.server, runner.uploads).since(before, STEPS * len(runner.server.layers))
        (cpu, between), (cpu_with, between_with) = figures
        said = "nothing"
        if told is not None:
            said = f"{told.read:.2f} read, {told.read_asked:.0%} right; {told.sent:.2f} sent, {told.sent_asked:.0%}"
        yield (
            f"share {share}/8: ratio {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}, {found.turns} turns), of "
            f"all time {found.whole:.3f}; CPU {cpu:.0f}, {cpu_with:.0f} us, between {between:.1f}, {between_with:.1f}; "
            f"foretold: {said}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", default=SUBJECTS)
    parser.add_argument("--vram", type=parse_size, default=parse_size("10GiB"))
    parser.add_argument("--shares", default="0,2")
    parser.add_argument("--seconds", type=float, default=20.0, help="of turns, for a share")
    arguments = parser.parse_args()
    for subject in arguments.subjects.split(","):
        name, weight_format, layers = subject.split(":")
        mix = FormatMix.parse(weight_format)
        prepared = prepare_synthetic(name, mix, int(layers), "hybrid", vram=arguments.vram)
        model = load(prepared, progress=False)
        dram = read_bandwidth(1 << 30).median
        print(f"{subject}, {arguments.vram / 2**30:g} GiB of VRAM, DRAM {dram:.0f} GB/s", flush=True)
        for row in rows(model.runner, [int(share) for share in arguments.shares.split(",")], arguments.seconds):
            print(f"  {row}", flush=True)
        del model, prepared


if __name__ == "__main__":
    main()
