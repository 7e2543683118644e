"""What it gains that decode steps read some missing experts over the link, and that it never costs more than 3%.

    python benchmarks/gpu_uploads.py --out DIR [--subjects deepseek-v3:IQ1_S:4,deepseek-v3:Q4_K:3,...]
        [--numbers 0,1,2,3,4,6,8] [--batches 1,4] [--threads 0,2] [--seconds 420] [--vram 24GiB]

No expert cache; routers without favourites, so that every token misses all its experts. First the bytes that land and
what is computed from them are compared with copies; a difference ends the run. Then steps with fixed numbers of
experts per layer take turns, and at last the choice that a runner makes by itself, from its first step on, in turns of
a few steps with steps without uploads (`paired_turns`: intervals, and what "kept", "broken" and "undecided" mean).
"median" and "whole" are times of its steps, trials included, over those without, each with its interval: promised is at
most 1.03. "ratio" is the median of the last turns, when it has chosen. `--threads`: of the CPU; 0: as many as it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.measured_costs import measure_costs
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.timed_runs import GpuTimedRuns, StepTimes
from moesaic.engine.gpu.upload_shares import ALL, UploadShares, expected_share
from moesaic.engine.gpu.uploads import MissUploads, seconds_to_bring
from moesaic.engine.loader import load
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kernels import moe_forward, num_threads, read_bandwidth, set_num_threads
from moesaic.kernels.triton.few_experts import experts_decode
from moesaic.modules.gpu.experts import copy_experts, slot_bytes
from moesaic.modules.gpu.landing import LandingSlots, why_not_sent
from moesaic.placement.units import parse_size
from moesaic.placement.vram import MAX_UPLOADS
from paired_turns import LEAST_TURNS, Turn, judge, take_turn
from upload_ways import UploadWays
from zipf_routers import ZipfRouters

SUBJECTS = "deepseek-v3:IQ1_S:4,qwen3-30b-a3b:IQ1_S:16,deepseek-v3:Q4_K:3"
PROMISE = 1.03
TURNS, STEPS = 3, 16
BLOCK = 4  # steps; twice as many with the automatic choice are a turn
PROMPT = 4
CPU_TOLERANCE = 3e-2  # the CPU rounds activations to 8 bits
Row = dict[str, Any]


def check(uploads: MissUploads, runner: ModelRunner) -> float:
    """Compare what landed and its products with copies of the experts; the largest error against the CPU's products."""
    experts, top_k, device = runner.decoder.routed[0], runner.decoder.top_k, runner.decoder.device
    landing = uploads.landing
    layout, arena = landing._layouts[0], torch.zeros_like(landing._arena)
    count = min(top_k, landing.num_slots)
    chosen = torch.randperm(experts.num_experts)[:count]
    for slot, expert in enumerate(chosen.tolist()):
        copy_experts(experts, expert, 1, layout, arena, slot)
    landing._arena.zero_()
    torch.cuda.synchronize()
    uploads.sender.bring(0, chosen.tolist())
    torch.cuda.synchronize()
    if not torch.equal(landing._arena, arena):
        raise SystemExit("experts that landed differ from copies of them")
    x, weights = torch.randn(1, experts.hidden, device=device), torch.rand(1, count, device=device)
    slots = torch.arange(count, dtype=torch.int32, device=device)[None]
    found = experts_decode(x, slots, chosen[None].to(device), weights, landing._arena, layout.kernel)
    expected = torch.empty(1, experts.hidden)
    moe_forward(x.cpu(), chosen[None], weights.cpu(), experts, out=expected)
    error = float((found.cpu() - expected).abs().max() / expected.abs().max())
    if not error < CPU_TOLERANCE:
        raise SystemExit(f"experts on the GPU differ from the CPU's by {error:.2e}")
    return error


class Subject:
    """A model whose runner decodes with fixed numbers of uploads, or as it chooses."""

    def __init__(self, name: str, vram: int) -> None:
        model_name, weight_format, *layers = name.split(":")
        count = int(layers[0]) if layers else None
        prepared = prepare_synthetic(model_name, FormatMix.parse(weight_format), count, "hybrid", vram=vram)
        self.model: Any = load(prepared, progress=False)
        self.runner: ModelRunner = self.model.runner
        runner, decoder = self.runner, self.runner.decoder
        self.chosen_at_start = runner.no_uploads or "on"
        staging = runner.staging
        runner.steps.slots, runner.staging = ExpertSlots(), None  # the VRAM is not what this is about
        # No memory moves meanwhile: that would be timed, and staging keeps its own.
        self.lending, runner.steps.lending, runner.steps.uploads = runner.lending, None, None
        torch.cuda.empty_cache()
        problem = why_not_sent(decoder.routed)
        if problem:
            raise SystemExit(f"no uploads: {problem}")
        self.costs = runner.shares.costs if staging is None else measure_costs(decoder.routed[0], staging)
        self.staging = staging
        self.landing = LandingSlots(decoder.routed, MAX_UPLOADS, decoder.top_k, decoder.device)
        self.expert_bytes = slot_bytes(decoder.routed[0])
        self.num_layers = len(decoder.routed)
        ZipfRouters(runner).set_exponent(0.0)
        self.uploads = MissUploads(self.landing, UploadShares())
        runner.steps.uploads = self.uploads

    def expected(self) -> int:
        """The share that is tried first."""
        per_upload = seconds_to_bring(self.uploads, self.runner.decoder.top_k)
        return expected_share(
            self.runner.decoder.top_k, per_upload, self.costs.per_read + self.costs.per_token, self.costs.fixed
        )

    def steps(self, batch: int, count: int, number: int | None) -> list[StepTimes]:
        """Decode steps with so many uploads per layer, or as the runner chooses."""
        if number is None:
            self.uploads.fixed = None
        else:
            self.uploads.fixed = [min(number, missing) for missing in range(self.landing.max_distinct + 1)]
        return GpuTimedRuns(self.runner, "decode", PROMPT, count + 1, batch).timed_steps(count)


def seconds(steps: list[StepTimes]) -> list[float]:
    """Of each step."""
    return [(step.ended - step.began) / 1e9 for step in steps]


def on_cpu(steps: list[StepTimes]) -> float:
    """Median seconds of a step in which the CPU computed experts."""
    return statistics.median(sum(done - seen for seen, _, done in step.layers) / 1e9 for step in steps)


def link_rows(subject: Subject) -> Iterator[Row]:
    """How fast experts come, alone and together."""
    for count in (1, 2, 4, 8, 16):
        each = seconds_to_bring(subject.uploads, count)
        yield {"part": "link", "experts": count, "us": each * 1e6, "gb_s": subject.expert_bytes / each / 1e9}
    costs = subject.costs
    yield {
        "part": "costs",
        "expert_mb": subject.expert_bytes / 1e6,
        "copy_us": costs.per_upload * 1e6,
        "copy_gb_s": subject.expert_bytes / costs.per_upload / 1e9,
        "cpu_us": (costs.per_read + costs.per_token) * 1e6,
        "cpu_gb_s": subject.expert_bytes / (costs.per_read + costs.per_token) / 1e9,
        "cpu_fixed_us": costs.fixed * 1e6,
        "expected_share": subject.expected(),
        "at_start": subject.chosen_at_start,
    }


def fixed_rows(subject: Subject, batch: int, numbers: list[int], left: Callable[[], float]) -> Iterator[Row]:
    """Steps with fixed numbers, in turns."""
    runs: dict[int, list[list[StepTimes]]] = {number: [] for number in numbers}
    for number in numbers:
        subject.steps(batch, 3, number)  # kernels and graphs
    for _ in range(TURNS):
        for number in numbers:
            if left() > 0:
                runs[number].append(subject.steps(batch, STEPS, number)[1:])
    without = statistics.median(x for run in runs[numbers[0]] for x in seconds(run))
    for number, done in runs.items():
        times = [x for run in done for x in seconds(run)]
        if not times:
            yield {"part": "fixed", "batch": batch, "number": number, "problem": "not run: no time left"}
            continue
        yield {
            "part": "fixed",
            "batch": batch,
            "number": number,
            "ms": statistics.median(times) * 1e3,
            "ms_from": min(times) * 1e3,
            "ms_to": max(times) * 1e3,
            "cpu_ms": statistics.median(on_cpu(run) for run in done) * 1e3,
            "ratio": statistics.median(times) / without,
        }


def automatic_row(subject: Subject, batch: int, most_turns: int, seconds: float) -> Row:
    """As the runner chooses from its first step on, in turns with steps without uploads."""
    subject.uploads.shares = UploadShares(subject.expected())
    ways, brought = UploadWays(subject.runner, subject.uploads, batch), subject.uploads.statistics()
    turns, ends = list[Turn](), time.monotonic() + seconds
    while len(turns) < LEAST_TURNS or (len(turns) < most_turns and time.monotonic() < ends):
        turns.append(take_turn(ways, BLOCK))
    ways.decode.close()
    now, found, late = subject.uploads.statistics(), judge(turns), judge(turns[-max(LEAST_TURNS, len(turns) // 4) :])
    return {
        "part": "automatic",
        "batch": batch,
        "turns": len(turns),
        "share": subject.uploads.shares.usual(batch) / ALL,
        "shares": ways.shares,
        "without_ms": statistics.median(turn.without for turn in turns) * 1e3,
        "ms": statistics.median(turn.own for turn in turns) * 1e3,
        "ratio": 1 / late.ratio,
        "median": [1 / found.ratio, 1 / found.high, 1 / found.low],
        "whole": [1 / found.whole, 1 / found.whole_high, 1 / found.whole_low],
        "verdict": found.verdict(1 / PROMISE),
        "steps_with": now.steps - brought.steps,
        "brought_per_layer": (now.brought - brought.brought) / max(1, now.steps - brought.steps) / subject.num_layers,
        "all_ms": [[round(turn.without * 1e3, 3), round(turn.own * 1e3, 3)] for turn in turns],
    }


def measure(arguments: argparse.Namespace, started: float) -> Iterator[Row]:
    """All rows of the one subject."""
    subject = Subject(arguments.subjects, arguments.vram)

    def left() -> float:
        return arguments.seconds - (time.monotonic() - started)

    yield {
        "part": "built",
        "device": torch.cuda.get_device_name(),
        "threads": num_threads(),
        "dram_gb_s": read_bandwidth(1 << 30).median,
        "seconds": time.monotonic() - started,
        "error": check(subject.uploads, subject.runner),
    }
    yield from link_rows(subject)
    numbers = [int(x) for x in arguments.numbers.split(",")]
    all_threads = num_threads()
    for threads in (int(x) for x in arguments.threads.split(",")):
        set_num_threads(threads or all_threads)
        for batch in (int(x) for x in arguments.batches.split(",")):
            extra = {"threads": threads or all_threads}
            if left() < 10:
                yield {"part": "fixed", "batch": batch, "problem": "not run: no time left"} | extra
                continue
            if threads:
                subject.costs = measure_costs(subject.runner.decoder.routed[0], subject.staging)
            chosen = numbers if batch == 1 else sorted({0, 4, 8, 16} | set(numbers[:1]))
            for row in fixed_rows(subject, batch, chosen, left):
                yield row | extra
            yield automatic_row(subject, batch, arguments.turns, max(5.0, left() / 2)) | extra
    set_num_threads(all_threads)


def text(row: Row) -> str:
    """A row to read."""
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
    )


def main() -> None:
    """A process for each subject, so that none finds what another left behind."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--subjects", default=SUBJECTS, metavar="MODEL:FORMAT[:LAYERS],...")
    parser.add_argument("--numbers", default="0,1,2,3,4,6,8", help="of uploads per layer; the first is compared with")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--threads", default="0,2")
    parser.add_argument("--turns", type=int, default=64, help="with the automatic choice, at most")
    parser.add_argument("--vram", type=parse_size, default=24 * 2**30)
    parser.add_argument("--seconds", type=float, default=420.0, help="for all subjects together")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    subjects = arguments.subjects.split(",")
    if len(subjects) > 1:
        for index, subject in enumerate(subjects):
            share = (arguments.seconds - (time.monotonic() - started)) / (len(subjects) - index)
            options = [item for item in sys.argv[1:] if not item.startswith(("--subjects=", "--seconds="))]
            for name in ("--subjects", "--seconds"):
                if name in options:
                    at = options.index(name)
                    del options[at : at + 2]
            command = [sys.executable, __file__, *options, "--subjects", subject, "--seconds", f"{share:.0f}"]
            subprocess.run(command, timeout=share + 60, check=False)
        return
    print(f"== {arguments.subjects}", flush=True)
    with (arguments.out / "uploads.jsonl").open("a") as file:
        for row in measure(arguments, started):
            print(text(row), flush=True)
            file.write(json.dumps({"subject": arguments.subjects} | row) + "\n")
            file.flush()
            if row.get("verdict") == "broken":
                print("   ^ a promise broken", flush=True)


if __name__ == "__main__":
    main()
