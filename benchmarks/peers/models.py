"""Part two: whole models on the CPU, ours beside llama.cpp and any `llama-bench`, on the same GGUF file.

The file has random weights and the real dimensions, and is deleted afterwards. Every turn is a process of its own that
loads the file; programs alternate. This module knows how programs are called, not what they do.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from process import Budget, ToolError, run_json
from synthetic_gguf import Recipe, recipe, write_gguf

from moesaic.errors import MoesaicError
from moesaic.kernels import read_bandwidth

__all__ = ["compare_models"]

HERE = Path(__file__).resolve().parent
_FILE_RATE = 4e8  # bytes of the file per second that writing it and loading it take at worst, all together
_HELD = 1.75  # bytes in memory per byte of the file: llama.cpp repacks some formats and keeps the file mapped
Rates = dict[str, float]


def compare_models(
    preset: str, weight_format: str, num_layers: int, args: argparse.Namespace, memory: int, budget: Budget
) -> dict[str, Any]:
    """One format of one model: a row per program; `state` says why nothing was measured where that is so."""
    unit: dict[str, Any] = {"part": "models", "model": preset, "format": weight_format, "programs": {}}
    if budget.left() <= 0:
        return unit | {"state": "not run: out of time"}
    try:
        chosen = _fitting(preset, weight_format, num_layers, memory)
    except MoesaicError as error:
        return unit | {"state": f"not run: the file cannot be written: {error}"[:200]}
    if chosen is None:
        return unit | {"state": "not run: too little memory for one layer"}
    if budget.left() < chosen.nbytes / _FILE_RATE:
        return unit | {"state": f"not run: out of time for a file of {chosen.nbytes / 1e9:.1f} GB"}
    unit["num_layers"] = chosen.num_layers
    unit["note"] = "" if chosen.num_layers == num_layers else f"{chosen.num_layers} of {num_layers} layers (memory)"
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        if shutil.disk_usage(folder).free < 1.05 * chosen.nbytes:
            return unit | {"state": f"not run: {folder} has too little room for {chosen.nbytes / 1e9:.1f} GB"}
        file = Path(folder) / "model.gguf"
        write_gguf(file, chosen)
        unit["file_bytes"], unit["bytes_per_token"] = file.stat().st_size, chosen.bytes_per_token
        turns, states, probes = _take_turns(_programs(file, args), args, budget)
    bandwidth = statistics.median(probes) if probes else float("nan")
    unit["read_bandwidth_gb_s"] = {"median": bandwidth, "probes": probes}
    for label, found in turns.items():
        unit["programs"][label] = _row(found, states.get(label), chosen.bytes_per_token, bandwidth)
    return unit | {"state": "ok"}


def _fitting(preset: str, weight_format: str, num_layers: int, memory: int) -> Recipe | None:
    for layers in range(num_layers, 0, -1):
        chosen = recipe(preset, weight_format, layers)
        if _HELD * chosen.nbytes <= memory:
            return chosen
    return None


def _programs(file: Path, args: argparse.Namespace) -> dict[str, Callable[[float], Rates]]:
    """How to take one turn of each program, within a number of seconds."""
    options = ["--prompt", str(args.prompt), "--tokens", str(args.decode), "--threads", str(args.threads)]
    options += ["--repeat", str(args.model_repeat)]

    def script(python: str, name: str) -> Callable[[float], Rates]:
        def turn(seconds: float) -> Rates:
            if not python or not Path(python).exists():
                raise ToolError("missing: " + ("no such environment" if python else "no environment given"))
            found: Rates = run_json([python, str(HERE / name), str(file), *options], seconds)
            return found

        return turn

    programs = {
        "moesaic": script(args.python, "run_moesaic.py"),
        "llama.cpp": script(args.llama_python, "run_llama_cpp.py"),
    }
    for given in args.llama_bench:
        label, equals, call = given.partition("=")
        if not equals or "/" in label:  # a path comes first, so there is no label
            label, call = "", given
        words = shlex.split(call)
        programs[label or " ".join([Path(words[0]).name, *words[1:]])] = _bench_turn(words, file, args)
    return programs


def _bench_turn(words: list[str], file: Path, args: argparse.Namespace) -> Callable[[float], Rates]:
    """A `llama-bench` of llama.cpp or of a program that kept its options."""
    command = [words[0], "-m", str(file), "-p", str(args.prompt), "-n", str(args.decode), "-t", str(args.threads)]
    command += ["-r", str(args.model_repeat), "-o", "json", *words[1:]]

    def turn(seconds: float) -> Rates:
        rates: Rates = {}
        for test in run_json(command, seconds):
            rate = statistics.median(test["samples_ts"]) if test.get("samples_ts") else float(test["avg_ts"])
            rates["prefill" if not test["n_gen"] else "decode"] = rate
        if rates.keys() != {"prefill", "decode"}:
            raise ToolError(f"crashed: reported only {', '.join(rates) or 'nothing'}")
        return rates

    return turn


def _take_turns(
    programs: dict[str, Callable[[float], Rates]], args: argparse.Namespace, budget: Budget
) -> tuple[dict[str, list[Rates]], dict[str, str], list[float]]:
    turns: dict[str, list[Rates]] = {label: [] for label in programs}
    states: dict[str, str] = {}
    probes: list[float] = []
    for _ in range(args.model_turns):
        probes.append(read_bandwidth(args.probe_bytes, 0.3).best)
        for label in _alive(programs, states):
            try:
                turns[label].append(programs[label](budget.limit(args.model_seconds)))
            except ToolError as error:
                states[label] = str(error)
    return turns, states, probes


def _alive(programs: dict[str, Callable[[float], Rates]], states: dict[str, str]) -> Iterator[str]:
    for label in programs:
        if label not in states:
            yield label


def _row(turns: list[Rates], state: str | None, bytes_per_token: int, bandwidth: float) -> dict[str, Any]:
    if not turns:
        return {"state": state or "not run"}
    row: dict[str, Any] = {what: statistics.median(turn[what] for turn in turns) for what in ("decode", "prefill")}
    row["share"] = row["decode"] * bytes_per_token / 1e9 / bandwidth
    row["turns"] = turns
    if state:
        row["later"] = state
    return row
