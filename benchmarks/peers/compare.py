r"""Moesaic beside kt-kernel, llama.cpp and any llama-bench, in one run on this machine; README.md says how to read it.

    python benchmarks/peers/compare.py --out benchmarks/results/NAME \
        --kt-python KT/bin/python --llama-python LLAMA/bin/python --llama-bench "ik -rtr=PATH -rtr 1"

Each program lives in an environment of its own. Results are stored after every unit as peers.json and peers.md; with
--resume, units that are stored there and for which the time sufficed are not run again. A program that is missing,
refuses or crashes becomes a cell that says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from experts import compare_experts
from machine import cache_bytes, describe, package_versions
from process import Budget
from report import markdown
from workload import MODELS, PAIRINGS

from models import compare_models
from moesaic.kernels import num_threads, set_num_threads
from moesaic.placement.hardware import detect_hardware

_LAYERS = {"qwen3-30b-a3b": 12, "deepseek-v3": 3}
_QUICK_LAYERS = {"qwen3-30b-a3b": 8, "deepseek-v3": 2}
_MODEL_FORMATS = ["Q4_K", "Q2_K", "IQ1_S", "Q8_0", "BF16"]
_QUICK = {
    "turns": 2,
    "seconds": 0.15,
    "repetitions": 1,
    "model_turns": 1,
    "model_repeat": 2,
    "decode": 16,
    "max_experts": 128,
    "budget": 540.0,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments; --quick only changes defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of peers.json and peers.md")
    parser.add_argument("--python", default=sys.executable, help="environment of Moesaic")
    parser.add_argument("--kt-python", default="", help="environment of kt-kernel")
    parser.add_argument("--llama-python", default="", help="environment of llama-cpp-python")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="[LABEL=]'PATH ARGUMENTS'")
    parser.add_argument("--note", default="", help="what else to say of the machine or the builds")
    parser.add_argument("--commit", default="", help="of Moesaic, where this is a copy without history")
    parser.add_argument("--parts", nargs="+", choices=["experts", "models"], default=["experts", "models"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=list(PAIRINGS), default=list(PAIRINGS), help="of the experts")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--model-formats", nargs="+", default=_MODEL_FORMATS, help="of whole models")
    parser.add_argument("--layers", type=int, help="of whole models (default: 12 of Qwen3, 3 of DeepSeek-V3)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after the prompt")
    parser.add_argument("--threads", type=int, help="of every program (default: as many as Moesaic takes)")
    parser.add_argument("--kt-threads", type=int, nargs="+", help="also try these for kt-kernel, a row each")
    parser.add_argument("--numa-nodes", type=int, help="that kt-kernel divides experts over (default: all)")
    parser.add_argument("--memory", type=float, help="GB to use (default: 80%% of what is available)")
    parser.add_argument("--scratch", help="folder for GGUF files (default: the system's)")
    parser.add_argument("--max-experts", type=int, default=1 << 16, help="hold no more experts of a layer than these")
    parser.add_argument("--turns", type=int, default=3, help="turns of every program with experts")
    parser.add_argument("--seconds", type=float, default=0.5, help="for a cell in a turn")
    parser.add_argument("--repetitions", type=int, default=2, help="at least so many in a turn")
    parser.add_argument("--cell-seconds", type=float, default=120.0, help="a cell that takes longer is given up")
    parser.add_argument("--model-turns", type=int, default=3)
    parser.add_argument("--model-repeat", type=int, default=3, help="runs in a turn of a whole model")
    parser.add_argument("--model-seconds", type=float, default=600.0, help="a turn that takes longer is given up")
    parser.add_argument("--budget", type=float, help="seconds for everything; what does not fit is listed as not run")
    parser.add_argument("--quick", action="store_true", help="few and short turns, fewer layers, nine minutes")
    parser.add_argument("--resume", action="store_true", help="keep what the folder holds")
    if "--quick" in argv:
        parser.set_defaults(**_QUICK)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run what is asked for and store it unit by unit."""
    args = parse(argv)
    budget = Budget(args.budget)
    hardware, cache = detect_hardware(), cache_bytes()
    if args.threads is not None:
        set_num_threads(args.threads)
    args.threads = num_threads()
    args.numa_nodes = args.numa_nodes or max(1, len(hardware.numa_nodes))
    memory = int(args.memory * 1e9 if args.memory else 0.8 * hardware.dram_available)
    args.probe_bytes = min(4 * cache + (1 << 28), memory // 4)
    layers = {model: args.layers or (_QUICK_LAYERS if args.quick else _LAYERS)[model] for model in MODELS}
    args.out.mkdir(parents=True, exist_ok=True)
    stored = _start(args, argv, cache)
    finished = {_key(unit): unit for unit in stored["units"] if _complete(unit)}
    stored["units"] = []
    for part, model, name in _plan(args):
        unit, started = finished.pop((part, model, name), None), time.monotonic()
        if unit is None and part == "experts":
            unit = compare_experts(model, name, args, cache, memory, budget)
        elif unit is None:
            unit = compare_models(model, name, layers[model], args, memory, budget)
        stored["units"].append(unit)
        print(f"{part} {model} {name}: {unit['state']}, {time.monotonic() - started:.0f} s", flush=True)
        _store(args.out, {**stored, "units": [*stored["units"], *finished.values()]})
    print(markdown({**stored, "units": [*stored["units"], *finished.values()]}))


def _plan(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Units in the order in which they are worth having when time runs out."""
    units = [("experts", model, name) for model in args.models for name in args.formats if "experts" in args.parts]
    whole = [("models", model, name) for model in args.models for name in args.model_formats if "models" in args.parts]
    order = {model: position for position, model in enumerate(args.models)}
    return sorted([*units, *whole], key=lambda unit: order[unit[1]])


def _start(args: argparse.Namespace, argv: list[str], cache: int) -> dict[str, Any]:
    """The stored document: a new one, or the one to go on with."""
    file = args.out / "peers.json"
    earlier = json.loads(file.read_text()) if args.resume and file.exists() else {"units": [], "commands": []}
    machine = describe(args.threads, cache, args.note, args.commit)
    machine["versions"] = {
        "moesaic": package_versions(args.python),
        "kt-kernel": package_versions(args.kt_python),
        "llama.cpp": package_versions(args.llama_python),
    }
    private = ("out", "python", "kt_python", "llama_python", "scratch")
    arguments = {name: value for name, value in vars(args).items() if name not in private}
    arguments["llama_bench"] = [_without_folders(given) for given in args.llama_bench]
    command = " ".join(["compare.py", *(shlex.quote(_without_folders(word)) for word in argv)])
    return {
        "machine": machine,
        "commands": [*earlier["commands"], command],
        "arguments": arguments,
        "units": earlier["units"],
    }


def _without_folders(text: str) -> str:
    """Results are for others to read: where programs lie on this machine is not."""
    return " ".join(re.sub(r"[^=]*/", "", word) for word in text.split(" "))


def _complete(unit: dict[str, Any]) -> bool:
    """Every program of it has run, crashed or refused: time was not what was missing."""
    return unit["state"] == "ok" and "not run" not in json.dumps(unit["programs"])


def _key(unit: dict[str, Any]) -> tuple[str, str, str]:
    return unit["part"], unit["model"], unit["format"]


def _store(folder: Path, stored: dict[str, Any]) -> None:
    (folder / "peers.json").write_text(json.dumps(stored, indent=1) + "\n")
    (folder / "peers.md").write_text(markdown(stored))


if __name__ == "__main__":
    main(sys.argv[1:])
