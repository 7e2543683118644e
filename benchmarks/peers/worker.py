"""The side of a worker: holds the experts of one program in memory and times forward passes when it is asked.

Requests and answers are lines of JSON on standard input and on what was standard output when the process started; what
a program prints itself goes to standard error. It knows no program: `serve` is given what loads one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from workload import Dims, routings

__all__ = ["Program", "serve"]


class Program(Protocol):
    """Experts in memory."""

    detail: str  # what runs: variant, instruction set
    expert_bytes: int

    def prepare(self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Callable[[], object]:
        """What computes one forward pass; only the call is timed.

        Args:
            layer: which copy of the layer.
            x: float32 `[num_tokens, hidden]`.
            index: int64 `[num_tokens, top_k]`.
            weights: float32 `[num_tokens, top_k]`.
        """


def serve(load: Callable[[dict[str, Any], Dims], Program]) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    program: Program | None = None
    for line in sys.stdin:
        request = json.loads(line)
        dims = Dims(*request["dims"])
        try:
            if request["do"] == "load":
                before = _resident()
                program = load(request, dims)
                reply = {
                    "detail": program.detail,
                    "expert_bytes": program.expert_bytes,
                    "resident_bytes": _resident() - before,
                }
            else:
                assert program is not None
                reply = _run(program, request, dims)
        except ImportError as error:
            reply = {"error": f"missing: {error}"}
        except Exception as error:  # whatever a program raises becomes a cell of the table
            reply = {"error": f"refused: {str(error) or type(error).__name__}"}
        answers.write(json.dumps(reply) + "\n")


def _run(program: Program, request: dict[str, Any], dims: Dims) -> dict[str, Any]:
    """Times of forward passes with another routing and another layer each, after one that warms up."""
    num_tokens, num_layers = request["tokens"], request["num_layers"]
    choices = routings(dims, request["num_experts"], num_tokens, request["seed"])
    x = torch.randn(num_tokens, dims.hidden, generator=torch.Generator().manual_seed(request["seed"]))
    weights = torch.full((num_tokens, dims.top_k), 1 / dims.top_k)
    times, distinct = [], []
    end = time.perf_counter() + request["seconds"]
    repetition = 0
    while repetition <= request["min_repetitions"] or (time.perf_counter() < end and repetition < 2000):
        index = next(choices)
        step = program.prepare((request["seed"] + repetition) % num_layers, x, index, weights)
        started = time.perf_counter()
        step()
        elapsed = time.perf_counter() - started
        if repetition:
            times.append(elapsed)
            distinct.append(len(index.unique()))
        else:
            end = time.perf_counter() + request["seconds"]
        repetition += 1
        if elapsed > request["seconds"] and times:  # one is enough of what takes this long
            break
    return {"seconds": times, "distinct": distinct}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
