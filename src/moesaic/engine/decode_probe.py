"""Measures what the parts of a decode step cost on this computer: products over cold weights, and everything else.

Weights are valid random blocks in memory of their own, as much of it as `Hardware.cold_bytes` says, used in turn: what
is read comes from DRAM, as in a model. It knows shapes and no model, except the small one that is shipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from moesaic.engine.decode_work import DecodeWork, ExpertLayer, Matrix, decode_work
from moesaic.engine.loader import load, prepare
from moesaic.engine.timed_runs import TimedRuns
from moesaic.kernels import (
    PackedExperts,
    PackedTensor,
    SlicedTensor,
    cut_intermediate,
    empty_stack,
    linear,
    moe_forward,
    native_seconds,
    num_threads,
)
from moesaic.kernels.ops import argmax
from moesaic.weights.synthetic import SyntheticCheckpoint

__all__ = ["Overhead", "Probe", "measure_overhead"]

_ROUNDS = 9  # of which the median counts
_SEED = 0
_DEMO_PROMPT, _DEMO_TOKENS, _DEMO_RUNS = 16, 49, 5


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a decode step besides the products: inside a layer, and per token outside the layers."""

    per_layer: float
    per_token: float


class Probe:
    """Measures on the threads and with the instruction set that are in force.

    Args:
        cold_bytes: bytes of weights to take in turn; 0 repeats the same weights, out of the caches.
        seconds: time for each figure, besides that to fill the memory.
    """

    def __init__(self, cold_bytes: int, seconds: float) -> None:
        self._cold_bytes, self._seconds = cold_bytes, seconds

    def matrices(self, group: tuple[Matrix, ...]) -> float:
        """Seconds that one token's products with these matrices take, one after the other."""
        if not group:
            return 0.0
        copies = max(1, -(-self._cold_bytes // sum(matrix.nbytes for matrix in group)))
        stacks = [PackedTensor.empty(matrix.format, matrix.rows, matrix.cols, copies) for matrix in group]
        for stack in stacks:
            _fill(stack)
        inputs = {matrix.cols: _token(matrix.cols) for matrix in group}
        outputs = [torch.empty(1, matrix.rows) for matrix in group]

        def step(i: int) -> None:
            for stack, out in zip(stacks, outputs, strict=True):
                linear(inputs[stack.cols], stack, out=out, index=i % copies)

        return _seconds(step, copies, self._seconds)

    def experts(self, layer: ExpertLayer) -> float:
        """Seconds that one token takes in the routed experts of such a layer."""
        wanted = max(layer.top_k, -(-self._cold_bytes // layer.expert_bytes))
        num_stacks = -(-wanted // layer.num_experts)
        per_stack = max(layer.top_k, -(-wanted // num_stacks))
        stacks = [_random_experts(layer, per_stack) for _ in range(num_stacks)]
        order = torch.randperm(per_stack, generator=torch.Generator().manual_seed(_SEED)).view(1, -1)
        starts = range(0, per_stack - layer.top_k + 1, layer.top_k)
        chosen = [(stack, order[:, i : i + layer.top_k].contiguous()) for stack in stacks for i in starts]
        x, out = _token(layer.hidden), torch.empty(1, layer.hidden)
        weights = torch.full((1, layer.top_k), 1 / layer.top_k)

        def step(i: int) -> None:
            stack, index = chosen[i % len(chosen)]
            moe_forward(x, index, weights, stack, out=out)

        return _seconds(step, len(chosen), self._seconds)

    def products(self, work: DecodeWork) -> tuple[float, float, float]:
        """Seconds of all products of a step: experts, other matrices of the layers, matrices outside the layers."""
        experts = sum(count * self.experts(layer) for layer, count in work.experts.items())
        others = sum(count * self.matrices(group) for group, count in work.layers.items())
        return experts, others, self.matrices(work.outside)


def measure_overhead(vocab_size: int, seconds: float) -> Overhead:
    """What a decode step costs besides its products, from the demo model, whose weights stay in the caches.

    The time of its decode step minus that of its products, measured like any other's; so it holds Python, the meeting
    of threads, norms, rotations, attention over a short cache and routing. The choice of a token is measured for
    `vocab_size` and put in the place of the demo's.

    Args:
        vocab_size: tokens to choose from.
        seconds: time for the products.

    Raises:
        ModelNotFoundError: this installation has no demo model.
    """
    prepared = prepare("demo", plan="cpu", offline=True)
    work = decode_work(prepared)
    runs = TimedRuns(load(prepared, progress=False), "decode", _DEMO_PROMPT, _DEMO_TOKENS)
    runs.run()
    step = statistics.median(1 / runs.run() for _ in range(_DEMO_RUNS))
    _, layer_share = runs.profile()
    experts, others, outside = Probe(0, seconds).products(work)
    per_token = step * (1 - layer_share) - outside - _choice_seconds(work.vocab_size) + _choice_seconds(vocab_size)
    return Overhead(max(0.0, (step * layer_share - experts - others) / work.num_layers), max(0.0, per_token))


def _choice_seconds(vocab_size: int) -> float:
    """Seconds of what a step does with a row of logits when it takes the likeliest token."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as while a model generates
    try:
        logits, times = torch.randn(1, vocab_size), []
        for _ in range(20):
            start = time.perf_counter()
            argmax(logits)
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    finally:
        torch.set_num_threads(threads)


def _seconds(step: Callable[[int], None], num_steps: int, seconds: float) -> float:
    """Native seconds of a step, after one turn through all `num_steps`.

    A round's figure is the mean of its steps, as a decode's is that of its tokens; the median of the rounds counts.
    """
    for i in range(num_steps):
        step(i)
    rounds, i = [], 0
    for _ in range(_ROUNDS):
        first, before, end = i, native_seconds(), time.perf_counter() + seconds / _ROUNDS
        while i == first or time.perf_counter() < end:
            step(i)
            i += 1
        rounds.append((native_seconds() - before) / (i - first))
    return statistics.median(rounds)


def _random_experts(layer: ExpertLayer, count: int) -> PackedExperts:
    """Experts as the loader makes them: cut over the memory nodes."""
    sizes = cut_intermediate(layer.intermediate, layer.down)
    inner, outer = (layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)
    gate = None if layer.gate is None else empty_stack(layer.gate, *inner, count, sizes, "rows")
    up = empty_stack(layer.up, *inner, count, sizes, "rows")
    down = empty_stack(layer.down, *outer, count, sizes, "cols")
    for stack in (gate, up, down):
        if stack is not None:
            _fill(stack)
    return PackedExperts(gate, up, down)


def _fill(stack: PackedTensor | SlicedTensor) -> None:
    shape = (stack.rows, stack.cols)
    raw = SyntheticCheckpoint("probe", {}, {"weights": (stack.format, shape)}, _SEED).raw("weights")
    with ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(lambda index: stack.pack_(index, raw), range(stack.num_matrices)))


def _token(width: int) -> torch.Tensor:
    return torch.randn(1, width, generator=torch.Generator().manual_seed(_SEED))
