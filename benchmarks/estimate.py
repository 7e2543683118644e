"""How near the speed that `moesaic doctor` expects is to the one that `moesaic bench decode` measures.

    python benchmarks/estimate.py [--model qwen3-30b-a3b] [--formats Q4_K,Q2_K] [--layers 4] [--turns 5] [--json]

The two take turns, each in a process of its own, so that other load on the machine falls on both; the medians of the
turns are compared, and the ratio of every turn is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Figures of one format: tokens per second of each turn, and read bandwidth that doctor measured (GB/s)."""

    format: str
    expected: tuple[float, ...]
    measured: tuple[float, ...]
    bandwidth: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Expected over measured, of the medians."""
        return statistics.median(self.expected) / statistics.median(self.measured)


def moesaic(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    command = [sys.executable, "-W", "ignore", "-m", "moesaic.cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout.startswith("{"):
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}")
    reply = json.loads(done.stdout)
    assert isinstance(reply, dict)
    return reply


def compare(model: list[str], name: str, turns: int) -> Result:
    expected, measured, bandwidth = [], [], []
    for _ in range(turns):
        report = moesaic("doctor", *model, "--format", name)
        expected.append(report["estimate"]["tokens_per_second"])
        bandwidth.append(report["read_bandwidth"])
        measured.append(moesaic("bench", "decode", *model, "--format", name)["tokens_per_second"])
    return Result(name, tuple(expected), tuple(measured), tuple(bandwidth))


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
    model = ["--synthetic", args.model, "--layers", str(args.layers)]
    model += [] if args.threads is None else ["--threads", str(args.threads)]
    if not args.json:
        print(f"{args.model}, {args.layers} layers, {args.turns} turns: medians in tok/s, then each turn")
        print("format    expected  measured  ratio  read bandwidth        ratios")
    for name in args.formats.split(","):
        result = compare(model, name, args.turns)
        print(json.dumps({**asdict(result), "ratio": result.ratio}) if args.json else line(result), flush=True)


if __name__ == "__main__":
    main()
