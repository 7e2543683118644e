"""What `gpu_subject.py` consists of beside the measurements: the task, the report, clocks, and the peaks of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.presets import get_preset
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kvcache.paged import PagedSequence
from moesaic.modules.linear import PackedLinear

GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        model: preset.
        weight_format: of matrices, as `FormatMix.parse` takes it.
        layers: how many; all if None.
        vram: bytes.
        parts: of `gpu.PARTS`.
        prefill: lengths of prompts.
        tokens: to decode in a run.
        repeat: runs.
        seconds: time for all of it, from the start of the process.
        zipf: exponents by which the GPU's routers choose, one after the other (see `zipf_routers`; 0: no favourites);
            none: the model's own routers.
        defer: experts of a token that arrive a layer late, in a row beside that of the cache; 0: no such row.
    """

    model: str
    weight_format: str
    layers: int | None
    vram: int
    parts: tuple[str, ...]
    prefill: tuple[int, ...]
    tokens: int
    repeat: int
    seconds: float
    zipf: tuple[float, ...] = ()
    defer: int = 0

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Task:
        """From JSON."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


class Report:
    """Rows, written as they come."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self._path, self._common = path, common

    def add(self, **row: Any) -> None:
        """One row; `problem` says why there are no figures."""
        full = self._common | row
        with self._path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        shown = {
            key: row[key] for key in ("plan", "what", "tokens", "tokens_per_second", "problem", "load_s") if key in row
        }
        print(f"[{time.strftime('%H:%M:%S')}] {shown}", file=sys.stderr, flush=True)


class TimedTail:
    """The layers on the CPU behind a split, with a clock for passes of up to `most` tokens."""

    def __init__(self, tail: Any) -> None:
        self._tail = tail
        self.start(1)

    def start(self, most: int) -> None:
        """Begin anew."""
        self._most = most
        self.layer_seconds = self.head_seconds = 0.0
        self.head_calls = 0

    @property
    def num_layers(self) -> int:
        return int(self._tail.num_layers)

    def __call__(self, hidden: torch.Tensor, sequence: PagedSequence, *layers: int) -> torch.Tensor:
        started = time.perf_counter()
        out: torch.Tensor = self._tail(hidden, sequence, *layers)
        if len(hidden) <= self._most:
            self.layer_seconds += time.perf_counter() - started
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        out: torch.Tensor = self._tail.logits(hidden)
        self.head_seconds += time.perf_counter() - started
        self.head_calls += 1
        return out


class Snapshot:
    """What a runner takes out of a model, to put it back."""

    def __init__(self, model: Any) -> None:
        self._model, self._class = model, model.__class__
        self._state = model._shared_state
        self._stack = None if self._state is None else self._state.stack
        self._own: list[tuple[Any, str, Any]] = []
        for module in model.modules():
            names = [name for name in ("forward", "packed") if name in module.__dict__]
            names += ["bias"] if isinstance(module, PackedLinear) else []
            self._own += [(module, name, getattr(module, name)) for name in names]

    def restore(self) -> None:
        """The model is as it was."""
        self._model.__class__ = self._class
        self._model.__dict__.pop("runner", None)
        if self._state is not None:
            self._state.stack = self._stack
        for module, name, value in self._own:
            setattr(module, name, value)


def memory(task: Task, report: Report) -> None:
    """`moesaic bench` in a process of its own: its peak of DRAM and VRAM against what the plan says."""
    layers = task.layers or get_preset(task.model).num_layers
    longest = max(task.prefill, default=512)
    plan = prepare_synthetic(
        task.model,
        FormatMix.parse(task.weight_format),
        layers,
        "hybrid",
        vram=task.vram,
        context=max(4096, longest + 1),
    ).plan
    command = [
        *("prefill", "--synthetic", task.model, "--format", task.weight_format, "--layers", str(layers)),
        *("--plan", "hybrid", "--vram", f"{task.vram / GIB:g}GiB", "--prompt-tokens", str(longest), "--repeat", "1"),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "moesaic.cli.main", "bench", *command, "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    row = {"plan": "memory", "what": "peak", "command": "moesaic bench " + " ".join(command)}
    if process.returncode != 0:
        report.add(**row, problem=f"exit status {process.returncode}")
        return
    result = json.loads(printed[printed.index("{") :])
    planned = plan.nbytes + plan.pinned_bytes()
    report.add(
        **row,
        host_peak=usage.ru_maxrss * 1024,
        host_weights=plan.nbytes,
        host_pinned=plan.pinned_bytes(),
        host_ratio=usage.ru_maxrss * 1024 / planned,
        vram_reserved=result["gpu"]["vram_peak"],
        tokens_per_second=result["tokens_per_second"],
    )
