"""One GPU and the DRAM: Moesaic's `hybrid` beside llama.cpp with `-ngl 99 -ot exps=CPU`, on the same GGUF files.

    python benchmarks/peers/compare_gpu.py --out DIR --llama-python LLAMA/bin/python [--subjects deepseek-v3:Q4_K:3,...]

A subject is PRESET:FORMAT:LAYERS. Its file has random weights and is deleted afterwards; each program is a process that
loads it once, one after the other. Rows are kept as they come (`rows.jsonl`), the table is `llama-cpp.md`. This module
knows how programs are called, not what they do; LLAMA is an environment with llama-cpp-python built with CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic_gguf import recipe, write_gguf

HERE = Path(__file__).resolve().parent
LLAMA = "llama.cpp"
SUBJECTS = "deepseek-v3:Q4_K:3,deepseek-v3:Q2_K:3,deepseek-v3:IQ1_S:3"
Row = dict[str, Any]


def rows_of(command: list[str], seconds: float, log: Path) -> list[Row]:
    """The JSON lines that a program prints within its time; what went wrong is a last row."""
    rows: list[Row] = []
    problem = ""
    with log.open("a") as errors, tempfile.TemporaryFile("w+") as output:
        print(f"== {' '.join(command)}", file=errors, flush=True)
        try:
            done = subprocess.run(command, stdout=output, stderr=errors, timeout=seconds, check=False)
            problem = "" if done.returncode == 0 else f"exit status {done.returncode}; see {log.name}"
        except subprocess.TimeoutExpired:
            problem = f"ended after {seconds:.0f} s"
        output.seek(0)
        for line in output:
            if line.startswith("{"):
                rows.append(json.loads(line))
    return [*rows, {"problem": problem}] if problem else rows


def measure_subject(subject: str, args: argparse.Namespace, ends: float) -> list[Row]:
    """Write the file, run both programs, delete it."""
    preset, weight_format, layers = subject.split(":")
    common = ["--prompts", args.prompts, "--tokens", str(args.tokens)]
    ours = ["--preset", preset, "--format", weight_format, "--vram", args.vram]
    theirs = ["--override", "exps=CPU", "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(file, recipe(preset, weight_format, int(layers)))
        size, log = file.stat().st_size, args.out / "log.txt"
        commands = {
            "Moesaic": [sys.executable, str(HERE / "run_moesaic_gpu.py"), str(file), *common, *ours],
            LLAMA: [args.llama_python, str(HERE / "run_llama_cpp_gpu.py"), str(file), *common, *theirs],
        }
        rows = []
        for index, (program, command) in enumerate(commands.items()):
            seconds = (ends - time.monotonic()) / (len(commands) - index)
            found = rows_of(command, seconds, log) if seconds > 10 else [{"problem": "not run: out of time"}]
            rows += [{"subject": subject, "bytes": size, "program": program, **row} for row in found]
    return rows


def best(rows: list[Row]) -> dict[tuple[str, int], dict[str, float]]:
    """Median tokens per second by what was measured and by program; of llama.cpp's micro-batches the better."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if "runs" in row:
            rates = found.setdefault((row["what"], row["tokens"]), {})
            name = row.get("way", row["program"])
            rates[name] = max(rates.get(name, 0.0), statistics.median(row["runs"]))
    return found


def table(subject: str, rows: list[Row]) -> list[str]:
    """One subject's figures."""
    found = best(rows)
    names = list(dict.fromkeys(name for rates in found.values() for name in rates))
    ours = [name for name in names if name != LLAMA]
    lines = [f"## {subject}, {rows[0]['bytes'] / 1e9:.1f} GB", ""]
    lines += ["| tok/s | " + " | ".join([*names, *(f"{name} ahead by" for name in ours)]) + " |"]
    lines += ["|---" * (1 + len(names) + len(ours)) + "|"]
    for (what, tokens), rates in found.items():
        label = what if what == "decode" else f"{what} of {tokens:,}"
        cells = [f"{rates[name]:,.1f}" if name in rates else "" for name in names]
        cells += [f"{rates[name] / rates[LLAMA]:.2f} x" if {name, LLAMA} <= set(rates) else "" for name in ours]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    problems = [f"- {row['program']}: {row['problem']}" for row in rows if "problem" in row]
    return [*lines, "", *problems, ""]


def render(rows: list[Row], machine: str) -> str:
    """The report."""
    lines = [f"# Beside llama.cpp with a GPU, {time.strftime('%d %B %Y')}", "", machine, ""]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        lines += table(subject, [row for row in rows if row["subject"] == subject])
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--llama-python", default="", metavar="PYTHON")
    parser.add_argument("--subjects", default=SUBJECTS)
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--tokens", type=int, default=32, help="to decode in a run")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of llama.cpp")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: that for temporary files)")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--machine", default="", help="a line about the machine for the report")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    stored, ends, subjects = args.out / "rows.jsonl", time.monotonic() + args.budget, args.subjects.split(",")
    for index, subject in enumerate(subjects):
        until = time.monotonic() + (ends - time.monotonic()) / (len(subjects) - index)
        with stored.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in measure_subject(subject, args, until))
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    report = render(rows, args.machine)
    (args.out / "llama-cpp.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
