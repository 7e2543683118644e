"""Decode and prefill on one GPU and the DRAM: hybrid, with a cache of experts, split by layers, and on the CPU alone.

    python benchmarks/gpu.py --out benchmarks/results/NAME [--budget 480] [--subjects deepseek-v3:Q4_K:4,...]
        [--parts decode,prefill,cache,layers,cpu,memory] [--prefill 512,2048,8192] [--tokens 32] [--repeat 3]
        [--zipf EXPONENT,..] [--defer N]

A subject is MODEL:FORMAT, or MODEL:FORMAT:LAYERS, or MODEL:FORMAT:LAYERS:VRAM; its random weights are built once in a
process of its own and serve all plans one after the other. Subjects get equal parts of the time that is left; what does
not fit is listed as not run. Rows are stored as they come (`rows.jsonl`), the table is `gpu.md`.

Parts: `decode` and `prefill` say what is timed, of `hybrid` and of the plans that `cache`, `layers` and `cpu` add.
`memory` runs `moesaic bench` itself and compares its peaks with the plan. Where a model is cut to a few layers, the
cache gets the share of the experts that it could hold of the whole model, and "whole model" is calculated, not
measured: head and layers take their measured times, as many on either side as the whole model would have there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moesaic.placement.units import parse_size

PARTS = ("decode", "prefill", "cache", "layers", "cpu", "memory")
DEFAULT_SUBJECTS = (
    "deepseek-v3:Q4_K:4,qwen3-30b-a3b:Q4_K,deepseek-v3:IQ1_S:4,deepseek-v3:Q2_K:4,"
    "qwen3-30b-a3b:Q2_K,qwen3-30b-a3b:IQ1_S"
)
GIB = 2**30
GRACE = 15.0  # seconds that a process gets beyond its time, to end by itself

Row = dict[str, Any]


def parse_subject(text: str, vram: int) -> Row:
    """Fields of a task from MODEL:FORMAT[:LAYERS[:VRAM]]."""
    model, weight_format, *rest = text.split(":")
    layers = int(rest[0]) if rest and rest[0] else None
    return {
        "model": model,
        "weight_format": weight_format,
        "layers": layers,
        "vram": parse_size(rest[1]) if len(rest) > 1 else vram,
    }


def run_subject(fields: Row, seconds: float, rows: Path, log: Path) -> str | None:
    """Measure a subject in a process of its own; what went wrong, or None."""
    script = Path(__file__).with_name("gpu_subject.py")
    argument = json.dumps(fields | {"seconds": seconds})
    with log.open("a") as output:
        print(f"== {argument}", file=output, flush=True)
        try:
            code = subprocess.run(
                [sys.executable, str(script), argument, str(rows)],
                stdout=output, stderr=output, timeout=seconds + GRACE, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"ended after {seconds + GRACE:.0f} s"
    return None if code == 0 else f"exit status {code}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _gib(value: float | None) -> str:
    return "" if not value else f"{value / GIB:.2f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


HEAD = (
    "| model | layers | plan | what | tok/s | spread | ms/layer | whole model tok/s | of the limit | experts on CPU ms "
    "| between ms | hits | VRAM GiB: tensors, card, budget |"
)


def table_row(row: Row) -> str:
    """A row of the table."""
    cells = [f"{row['model']} {row['format']}", f"{row['layers']}/{row['total_layers']}", row["plan"]]
    what = f"{row.get('what', '')} {row.get('tokens', '')}".strip()
    if "problem" in row:
        return "| " + " | ".join([*cells, what, row["problem"].replace("|", "/"), *[""] * 8]) + " |"
    runs = row["runs"]
    memory = ""
    if row.get("vram_reserved"):
        memory = f"{_gib(row['vram_reserved'])}, {_gib(row['vram_used'])}, {_gib(row['vram_budget'])}"
    hits = f"{row['hit_rate']:.1%} of {row['slots']}" if row.get("slots") and row.get("hit_rate") is not None else ""
    cells += [
        what,
        f"{row['tokens_per_second']:.2f}",
        f"{min(runs):.2f}-{max(runs):.2f} ({len(runs)})",
        _number(row.get("layer_ms"), 3),
        _number(row.get("whole_tokens_per_second"), 2),
        _share(row.get("roofline_share")),
        _number(row.get("experts_ms"), 2),
        _number(row.get("between_ms"), 2),
        hits,
        memory,
    ]
    return "| " + " | ".join(cells) + " |"


def ratios(rows: list[Row]) -> list[str]:
    """Each kind of hybrid against the other plans, of the whole model where it was cut."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.get("tokens_per_second") and "runs" in row:
            key = (row["model"], row["format"], f"{row['what']} {row['tokens']}")
            rate = row.get("whole_tokens_per_second") or row["tokens_per_second"]
            found.setdefault(key, {})[re.sub(r" \d+/\d+$", "", row["plan"])] = rate
    lines = []
    for (model, fmt, what), plans in found.items():
        others = [name for name in plans if not name.startswith("hybrid")]
        for kind in (name for name in plans if name.startswith("hybrid")):
            against = [*others, *(["hybrid"] if kind != "hybrid" and "hybrid" in plans else [])]
            if against:
                each = ", ".join(f"{plans[kind] / plans[name]:.2f} x {name}" for name in against)
                lines.append(f"- {model} {fmt}, {what}: {kind} is {each}")
    return lines


def render(rows: list[Row], machine: str) -> str:
    """The report."""
    measured = [row for row in rows if row["plan"] not in ("load", "memory")]
    lines = [f"# One GPU and the DRAM, {time.strftime('%d %B %Y')}", "", machine, ""]
    for row in rows:
        if row["plan"] == "load" and "problem" not in row:
            lines.append(
                f"- {row['model']} {row['format']}: built in {row['load_s']:.0f} s; {row['device']}, {row['isa']}, "
                f"{row['threads']} threads; DRAM {row['read_bandwidth']:.0f}, VRAM {row['vram_bandwidth']:.0f} GB/s"
            )
    lines += ["", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", *map(table_row, measured), ""]
    lines += [*ratios(rows), ""]
    for row in rows:
        if row["plan"] == "memory" and "problem" not in row:
            lines.append(
                f"- {row['model']} {row['format']}: peak of DRAM {_gib(row['host_peak'])} GiB, weights "
                f"{_gib(row['host_weights'])} and pinned {_gib(row['host_pinned'])}: {row['host_ratio']:.3f} x; of "
                f"VRAM {_gib(row['vram_reserved'])} of {_gib(row['vram_budget'])} GiB"
            )
        elif "problem" in row and row["plan"] in ("load", "memory"):
            lines.append(f"- {row['model']} {row['format']}: {row['plan']}: {row['problem']}")
    commands = list(dict.fromkeys(row["command"] for row in rows if "command" in row))
    return "\n".join([*lines, "", "Each row alone:", "", "```bash", *commands, "```", ""])


def read_rows(path: Path) -> list[Row]:
    """What has been measured; of what was measured again the newest figures."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept: dict[tuple[Any, ...], Row] = {}
    for row in map(json.loads, lines):
        key = tuple(row.get(name) for name in ("model", "format", "layers", "vram_budget", "plan", "what", "tokens"))
        if "problem" not in row or "problem" in kept.get(key, row):
            kept.pop(key, None)
            kept[key] = row
    return list(kept.values())


def measure_all(arguments: argparse.Namespace, rows: Path) -> None:
    """One process per subject, and one more for `memory`."""
    ends = time.monotonic() + arguments.budget
    parts = [part for part in arguments.parts.split(",") if part != "memory"]
    if parts and not {"decode", "prefill"} & set(parts):
        parts.append("decode")
    subjects = [parse_subject(text, parse_size(arguments.vram)) for text in arguments.subjects.split(",")]
    jobs = [(subject, parts) for subject in subjects if parts]
    if "memory" in arguments.parts.split(","):
        jobs.append((subjects[0], ["memory"]))
    for index, (subject, chosen) in enumerate(jobs):
        seconds = (ends - time.monotonic()) / (len(jobs) - index) - 3.0
        fields = subject | {
            "parts": chosen,
            "prefill": [int(n) for n in arguments.prefill.split(",")],
            "tokens": arguments.tokens,
            "repeat": arguments.repeat,
            "zipf": [float(part) for part in arguments.zipf.split(",") if part],
            "defer": arguments.defer,
        }
        problem = f"not run: {seconds:.0f} s left" if seconds < 15 else None
        problem = problem or run_subject(fields, seconds, rows, rows.with_name("log.txt"))
        if problem:
            layers = subject["layers"] or "all"
            named = {
                "model": subject["model"],
                "format": subject["weight_format"],
                "layers": layers,
                "total_layers": "",
            }
            with rows.open("a") as file:
                plan = "memory" if chosen == ["memory"] else "load"
                file.write(json.dumps(named | {"plan": plan, "what": "process", "problem": problem}) + "\n")


def summary(rows: list[Row]) -> str:
    """What fits in a terminal: a line per row."""
    lines = []
    for row in rows:
        head = f"{row['model']} {row['format']} {row['plan']:<14} {row.get('what', '')} {row.get('tokens', '')}"
        if "problem" in row:
            lines.append(f"{head}: {row['problem']}")
        elif "runs" in row:
            extra = "".join(
                f" {label} {row[key]:{form}}"
                for key, label, form in (
                    ("whole_tokens_per_second", "whole", ".2f"),
                    ("roofline_share", "limit", ".0%"),
                    ("experts_ms", "cpu-ms", ".2f"),
                    ("between_ms", "between", ".2f"),
                    ("head_ms", "head", ".2f"),
                    ("hit_rate", "hits", ".1%"),
                    ("gpu_layer_ms", "gpu-layer", ".3f"),
                    ("cpu_layer_ms", "cpu-layer", ".3f"),
                )
                if row.get(key) is not None
            )
            vram = f" vram {_gib(row['vram_reserved'])}/{_gib(row['vram_used'])}" if row.get("vram_reserved") else ""
            spread = statistics.pstdev(row["runs"]) / row["tokens_per_second"]
            lines.append(
                f"{head}: {row['tokens_per_second']:.2f} +-{spread:.0%} {row['layer_ms']:.3f} ms/layer{extra}{vram}"
            )
    return "\n".join([*lines, *ratios(rows)])


def main(argv: list[str] | None = None) -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--subjects", default=DEFAULT_SUBJECTS)
    parser.add_argument("--parts", default="decode,prefill,cache,layers,cpu", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--prefill", default="512,2048,8192", metavar="N,N", help="lengths of prompts")
    parser.add_argument("--tokens", type=int, default=32, help="to decode in a run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument(
        "--zipf", default="", metavar="EXPONENT,..", help="hybrid: random routers, with favourites from an exponent on"
    )
    parser.add_argument(
        "--defer", type=int, default=0, metavar="N", help="also the cache with N experts of a token one layer late"
    )
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument("--machine", default="", help="a line about the machine for the report")
    parser.add_argument(
        "--render", action="store_true", help="make the table of what the folder holds, and measure nothing"
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows.jsonl"
    if not arguments.render:
        measure_all(arguments, path)
    rows = read_rows(path)
    (arguments.out / "gpu.md").write_text(render(rows, arguments.machine))
    (arguments.out / "gpu.json").write_text(json.dumps(rows, indent=1))
    print(summary(rows))


if __name__ == "__main__":
    main()
