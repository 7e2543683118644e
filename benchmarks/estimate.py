"""How near the speed that `moesaic doctor` expects is to the one that `moesaic bench decode` measures.

    python benchmarks/estimate.py [--model qwen3-30b-a3b] [--formats Q4_K,Q2_K] [--layers 4] [--turns 5] [--json]

In one process, with what the two commands use: in every turn the estimate is measured anew and then a run of decode, so
that other load on the machine falls on both. The medians of the turns are compared; the ratio of every turn is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass

from moesaic.engine.estimate import divide, measure_decode
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.loader import load
from moesaic.engine.subjects import prepare_synthetic
from moesaic.engine.timed_runs import TimedRuns
from moesaic.kernels import active_isa, num_threads, read_bandwidth, set_num_threads
from moesaic.placement import detect_hardware

PROMPT_TOKENS, NEW_TOKENS = 16, 33  # as `moesaic bench decode`


@dataclass(frozen=True)
class Result:
    """Of one format and each turn: tokens per second, milliseconds of the parts, and read bandwidth (GB/s)."""

    format: str
    expected: tuple[float, ...]
    measured: tuple[float, ...]
    bandwidth: tuple[float, ...]
    parts: tuple[tuple[float, ...], ...]

    @property
    def ratio(self) -> float:
        """Expected over measured, of the medians."""
        return statistics.median(self.expected) / statistics.median(self.measured)


def compare(model: str, name: str, num_layers: int, turns: int) -> Result:
    hardware = detect_hardware()
    prepared = prepare_synthetic(model, FormatMix.parse(name), num_layers, "cpu")
    subject = prepare_synthetic(model, FormatMix.parse(name), num_layers, "cpu")  # loading takes one up
    runs = TimedRuns(load(subject, progress=False), "decode", PROMPT_TOKENS, NEW_TOKENS)
    runs.run()
    expected, measured, bandwidth, milliseconds = [], [], [], []
    for _ in range(turns):
        bandwidth.append(read_bandwidth(hardware.probe_bytes, 0.5).median)
        parts = divide(prepared.plan, measure_decode(prepared, hardware), bandwidth[-1])
        milliseconds.append(tuple(1e3 * part.seconds for part in parts))
        expected.append(1e3 / sum(milliseconds[-1]))
        measured.append(runs.run())
    return Result(name, tuple(expected), tuple(measured), tuple(bandwidth), tuple(milliseconds))


def line(r: Result) -> str:
    """A row of the table."""
    each = " ".join(f"{a / b:.2f}" for a, b in zip(r.expected, r.measured, strict=True))
    return (
        f"{r.format:8} {statistics.median(r.expected):9.2f} {statistics.median(r.measured):9.2f} {r.ratio:6.2f}  "
        f"{min(r.bandwidth):.1f} to {max(r.bandwidth):.1f} GB/s  {each}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", metavar="PRESET", help="as for 'moesaic bench --synthetic'")
    parser.add_argument("--formats", default="Q4_K,Q2_K")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        set_num_threads(args.threads)
    if not args.json:
        machine = f"{active_isa()}, {num_threads()} threads"
        print(f"{args.model}, {args.layers} layers, {machine}, {args.turns} turns: medians in tok/s, then each turn")
        print("format    expected  measured  ratio  read bandwidth        ratios")
    for name in args.formats.split(","):
        result = compare(args.model, name, args.layers, args.turns)
        print(json.dumps({**asdict(result), "ratio": result.ratio}) if args.json else line(result), flush=True)


if __name__ == "__main__":
    main()
