"""Moesaic and llama.cpp side by side: decode and prefill of a whole model on the same GGUF, machine and threads, CPU.

    python benchmarks/peers/compare.py --llama-python OTHER/bin/python --formats Q4_K Q2_K Q8_0 --layers 12

OTHER is an environment in which `llama-cpp-python` was built from its sdist for this processor. The file is written
once per format into a temporary folder; the two programs then take turns, so that a drift of the machine's speed meets
both. The rates are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from synthetic_gguf import write_synthetic_gguf

HERE = Path(__file__).resolve().parent


def run_json(command: list[str]) -> dict[str, float]:
    """Run a program and parse the last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    parsed: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


def compare(file: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over `args.turns` turns of both programs."""
    options = ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--threads", str(args.threads)]
    commands = {
        "moesaic": [sys.executable, str(HERE / "run_moesaic.py"), str(file), *options],
        "llama.cpp": [args.llama_python, str(HERE / "run_llama_cpp.py"), str(file), *options],
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(args.turns):
        for name, command in commands.items():
            turns[name].append(run_json(command))
    return {
        name: {what: statistics.median(turn[what] for turn in found) for what in ("decode", "prefill")}
        for name, found in turns.items()
    }


def main() -> None:
    """Write the files, take turns, print a table and JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--formats", nargs="+", default=["Q4_K", "Q2_K", "Q8_0"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    results = {}
    print(f"{'format':8} {'':10} {'decode tok/s':>14} {'prefill tok/s':>14}")
    for weight_format in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{args.preset}-{weight_format}.gguf"
            write_synthetic_gguf(file, args.preset, weight_format, args.layers)
            results[weight_format] = compare(file, args)
        for name, rates in results[weight_format].items():
            print(f"{weight_format:8} {name:10} {rates['decode']:14.2f} {rates['prefill']:14.1f}", flush=True)
    print(json.dumps({"arguments": vars(args), "results": results}))


if __name__ == "__main__":
    main()
