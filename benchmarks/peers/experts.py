"""Part one: the routed experts of one layer, ours beside kt-kernel's.

Both programs hold the same number of experts of the same layers in memory and take turns; the one that is not measured
is stopped. Read bandwidth is measured between the turns, so that a drift of the machine meets all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from process import Budget, ToolError, Worker
from random_blocks import random_blocks
from workload import GGUF_TYPES, MODELS, PAIRINGS, Dims, Size, choose_size

from moesaic.kernels import read_bandwidth
from moesaic.quant import FORMATS

__all__ = ["compare_experts"]

HERE = Path(__file__).resolve().parent
_LOAD_SECONDS = 300.0


class _Side:
    """One program of a pair and what was measured of it."""

    def __init__(self, label: str, python: str, script: str, request: dict[str, Any]) -> None:
        self.label, self._python, self._script = label, python, HERE / script
        self._request = request
        self._worker: Worker | None = None
        self.state = "ok"
        self.row: dict[str, Any] = {"format": request["format"], "threads": request["threads"]}
        self.times: dict[int, list[tuple[float, int]]] = {}
        self.cells: dict[int, str] = {}

    def load(self, budget: Budget) -> None:
        """Start the process and let it fill its memory; it is stopped afterwards."""
        try:
            if not self._python or not Path(self._python).exists():
                raise ToolError("missing: " + ("no such environment" if self._python else "no environment given"))
            if self._request["format"] is None:
                raise ToolError("refused: this build has no such format")
            self._worker = Worker(self._python, self._script)
            reply = self._worker.ask({"do": "load", **self._request}, budget.limit(_LOAD_SECONDS))
            self._worker.pause()
            self.row |= reply
            held = self._request["num_layers"] * self._request["num_experts"] * reply["expert_bytes"]
            if reply["resident_bytes"] < 0.9 * held:
                raise ToolError(f"refused: holds {reply['resident_bytes']} bytes for {held} bytes of weights")
        except ToolError as error:
            self.fail(str(error))

    def run(self, num_tokens: int, seed: int, args: argparse.Namespace, budget: Budget) -> None:
        """One turn."""
        if self.state != "ok" or num_tokens in self.cells:
            return
        assert self._worker is not None
        request = {"do": "run", "tokens": num_tokens, "seed": seed, "seconds": args.seconds}
        self._worker.resume()
        try:
            timeout = budget.limit(args.cell_seconds)
            reply = self._worker.ask({**self._request, **request, "min_repetitions": args.repetitions}, timeout)
            found = zip(reply["seconds"], reply["distinct"], strict=True)
            self.times.setdefault(num_tokens, []).extend(found)
            self._worker.pause()
        except ToolError as error:
            self.cells[num_tokens] = str(error)
            if num_tokens not in self.times:
                self.fail(str(error), keep=True)

    def fail(self, state: str, keep: bool = False) -> None:
        """Measure no more of it; `keep` what there is."""
        self.state = state if not self.times or not keep else f"later {state}"
        self.row["state"] = self.state
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def result(self, dims: Dims, tokens: list[int], bandwidth: float) -> dict[str, Any]:
        """The row of the table."""
        cells: dict[str, Any] = {}
        for count in tokens:
            times = self.times.get(count)
            if not times:
                cells[str(count)] = {"state": self.cells.get(count, self.state.removeprefix("later "))}
                continue
            seconds = statistics.median(elapsed for elapsed, _ in times)
            rate = statistics.median(distinct * self.row["expert_bytes"] / elapsed for elapsed, distinct in times) / 1e9
            cells[str(count)] = {
                "ms": seconds * 1e3,
                "gb_s": rate,
                "share": rate / bandwidth,
                "gmac_s": count * dims.top_k * dims.weights / seconds / 1e9,
                "repetitions": len(times),
                "experts_read": statistics.median(distinct for _, distinct in times),
            }
        return self.row | {"cells": cells}


def compare_experts(
    model: str, name: str, args: argparse.Namespace, cache: int, memory: int, budget: Budget
) -> dict[str, Any]:
    """One pair of formats at one model's dimensions: a row per program.

    Returns:
        What report.py shows; `state` says why nothing was measured where that is so.
    """
    dims, pairing = MODELS[model], PAIRINGS[name]
    unit: dict[str, Any] = {"part": "experts", "model": model, "format": name, "programs": {}}
    programs = 1 + len(args.kt_threads or [0])
    size = choose_size(dims, pairing, cache, memory, programs, args.max_experts)
    if budget.left() <= 0:
        return unit | {"state": "not run: out of time"}
    if size is None:
        return unit | {"state": "not run: too little memory"}
    unit |= {"num_experts": size.num_experts, "num_layers": size.num_layers, "note": size.note}
    with tempfile.TemporaryDirectory() as folder:
        sides = _sides(name, dims, size, args, Path(folder))
        try:
            for side in reversed(sides):  # kt-kernel first: while it loads it needs the most memory
                side.load(budget)
            probes = _take_turns(sides, args, budget)
        finally:
            for side in sides:
                side.close()
    bandwidth = statistics.median(probes) if probes else float("nan")
    unit["read_bandwidth_gb_s"] = {"median": bandwidth, "probes": probes}
    unit["programs"] = {side.label: side.result(dims, args.tokens, bandwidth) for side in sides}
    unit["state"] = "ok"
    return unit


def _sides(name: str, dims: Dims, size: Size, args: argparse.Namespace, folder: Path) -> list[_Side]:
    common = {
        "pairing": name,
        "dims": [dims.hidden, dims.intermediate, dims.num_experts, dims.top_k],
        "num_experts": size.num_experts,
        "num_layers": size.num_layers,
        "numa_nodes": args.numa_nodes,
    }
    ours = next((fmt for fmt in PAIRINGS[name].ours if fmt in FORMATS), None)
    if name in GGUF_TYPES:
        common["blocks"] = str(folder / "blocks.npy")
        np.save(common["blocks"], random_blocks(name, 4096), allow_pickle=False)
    sides = [_Side("moesaic", args.python, "experts_moesaic.py", {**common, "format": ours, "threads": args.threads})]
    for threads in args.kt_threads or [args.threads]:
        label = "kt-kernel" if threads == args.threads else f"kt-kernel, {threads} threads"
        request = {**common, "format": name, "threads": threads}
        sides.append(_Side(label, args.kt_python, "experts_kt.py", request))
    return sides


def _take_turns(sides: list[_Side], args: argparse.Namespace, budget: Budget) -> list[float]:
    """Measure; the bandwidths found in between."""
    probes = []
    for turn in range(args.turns):
        for num_tokens in args.tokens:
            order = sides if (turn + num_tokens) % 2 else sides[::-1]
            for side in order:
                side.run(num_tokens, 1000 * turn + num_tokens, args, budget)
        if any(side.state == "ok" for side in sides):
            probes.append(read_bandwidth(args.probe_bytes, 0.3).best)
    return probes
