"""A runner's steps without their results, so that all their kernels are compiled before the first request.

Decode steps of every size and prompts of every length that kernels tell apart go through the layers while launches are
only noted (`kernels.triton.ahead`). It knows which steps there are, and no kernel.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.packing import Progress
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.ahead import KernelsAhead
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS
from moesaic.kernels.triton.loading import kernel_folder
from moesaic.kernels.triton.route import Request
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.gpu.step import Forecast, GpuStep, Routed
from moesaic.placement.vram import PREFILL_CHUNK

__all__ = ["compile_kernels", "rehearse_prefill"]

_LOG = logging.getLogger("moesaic.gpu")
_QUIET_SECONDS = 1.0
"""Reading kernels that were compiled before takes less, and nobody need be told."""
_SHORT_PROMPTS = (16, 32, 64, 100)
"""Tokens, one for each size of tiles below the lengths from which matrices are expanded."""
_FIRST_EXPANDED = 128
_LAST_TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens whose logits a chunk is computed for; one for each size that kernels tell apart."""


def compile_kernels(runner: ModelRunner, num_threads: int, progress: Progress = True) -> None:
    """Compile what a runner's steps need, wait for it, and capture the graph of one sequence.

    If the rehearsal fails, somebody is told, and what it would have needed is compiled when it is launched first.

    Args:
        runner: of a loaded model, that nobody uses yet.
        num_threads: that compile.
        progress: True draws a bar on stderr if it takes longer than a moment; otherwise only the log is told.
    """
    ahead = KernelsAhead(num_threads)
    try:
        with torch.no_grad(), ahead.note():
            _rehearse(runner)
        with _Report(progress is True) as report:
            ahead.wait(report)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        _LOG.warning("kernels are compiled when they are needed first: the rehearsal failed (%s)", error, exc_info=True)
    finally:
        ahead.close()
    runner.steps.bucket(1)


def _rehearse(runner: ModelRunner) -> None:
    """All steps; those first whose kernels take longest."""
    for length, blocks in reversed(list(_prompts(runner))):
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # it would want memory that is lent to it when it runs
            rehearse_prefill(runner, length, blocks)
        _give_back(runner)
    for count in reversed(_LAST_TOKENS):
        rehearse_finish(runner, count)
    for size in reversed(runner.steps.sizes):
        runner.steps.rehearse(size)
    _give_back(runner)


def _give_back(runner: ModelRunner) -> None:
    """Memory that PyTorch keeps would be in the way of pieces of other sizes."""
    if runner.decoder.device.type == "cuda":
        torch.cuda.empty_cache()


def _prompts(runner: ModelRunner) -> Iterator[tuple[int, int]]:
    """Tokens of prompts, with blocks of their sequences: as many as they need, as there can be, or, once, in between.

    Kernels tell no prompts apart that are longer than PREFILL_CHUNK.
    """
    most = min(runner.options.max_chunk, PREFILL_CHUNK)
    blocks = runner.pool.blocks_for(runner.max_positions)
    lengths = [1, MAX_DECODE_TOKENS, *_SHORT_PROMPTS]
    length = _FIRST_EXPANDED
    while length < most:
        lengths.append(length)
        length *= 2
    for length in sorted({min(length, most) for length in [*lengths, most]}):
        least = min(blocks, runner.pool.blocks_for(length))
        between = [1 << power for power in range(blocks.bit_length())] if length == _SHORT_PROMPTS[0] else []
        for wide in sorted({least, *(wide for wide in between if wide > least), blocks}):
            yield length, wide


def rehearse_prefill(runner: ModelRunner, num_tokens: int, num_blocks: int) -> None:
    """The launches of a prompt.

    Args:
        runner: whose.
        num_tokens: of the prompt.
        num_blocks: of its sequence, what came before included.
    """
    device, decoder = runner.decoder.device, runner.decoder
    step_input = StepInput.empty(num_tokens, 1, num_blocks).to(device)
    hidden = torch.zeros(num_tokens, decoder.hidden_size, device=device)
    path = _Rehearsed(runner)
    step = GpuStep(step_input, runner.caches, decoder.angles, num_tokens, path)
    decoder.run(hidden, step)
    if num_tokens <= MAX_DECODE_TOKENS:  # few tokens end a layer otherwise if what follows is not the next one
        for layer in range(len(decoder.layers)):
            decoder.run(hidden, step, layer, 1)
    if decoder.tail is None:
        decoder.logits(hidden if num_tokens <= MAX_DECODE_TOKENS else hidden[-1:].contiguous())


def rehearse_finish(runner: ModelRunner, num_rows: int) -> None:
    """The launches of the last layer for so many tokens, of a prompt that has one more."""
    device, decoder = runner.decoder.device, runner.decoder
    if decoder.tail is not None:
        return
    step_input = StepInput.empty(num_rows + 1, 1, runner.pool.blocks_for(num_rows + 1)).to(device)
    hidden = torch.zeros(num_rows + 1, decoder.hidden_size, device=device)
    step = GpuStep(step_input, runner.caches, decoder.angles, num_rows + 1, _Rehearsed(runner))
    decoder.logits(decoder.finish(hidden, step, torch.arange(num_rows, device=device)))


class _Rehearsed:
    """An `ExpertPath` of prompts that launches what any of them may launch, and asks the CPU for nothing."""

    def __init__(self, runner: ModelRunner) -> None:
        self._exchange, self._slots, self._staging = runner.hand_off.exchange, runner.slots, runner.staging

    def table(self, layer: int) -> torch.Tensor | None:
        """As `ExpertPath`."""
        return self._slots.table(layer)

    def request(self, layer: int) -> Request | None:
        """As `ExpertPath`: the CPU is asked otherwise."""
        return None

    def forecast(self, layer: int, num_tokens: int) -> Forecast | None:
        """As `ExpertPath`: nobody waits for it."""
        return None

    def start(self, routed: Routed) -> None:
        """As `ExpertPath`."""

    def finish(
        self,
        routed: Routed,
        residual: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: torch.Tensor | None,
        scale: float,
        then: NormBefore | None = None,
    ) -> Lanes | None:
        """As `ExpertPath`."""
        total = self._slots.compute(routed)
        if total is None or not self._slots.is_complete(routed.layer):
            self._stream(routed)
            total = torch.zeros_like(residual)
        return self._exchange.take_back(
            None, residual, shared=shared, shared_gate=shared_gate, cached=total, scale=scale, then=then
        )

    def _stream(self, routed: Routed) -> None:
        """As `StreamingPath`, with one group."""
        staging = self._staging
        if staging is None or len(routed.hidden) <= MAX_DECODE_TOKENS:
            return
        layout = staging.layouts[routed.layer]
        pairs = layout.pairs(routed.hidden, routed.chosen, routed.weights)
        self._slots.multiply(routed.layer, pairs)
        tables = np.zeros((1, pairs.num_experts), np.int32)
        (table, *_), _ = staging.tables.upload(tables, np.zeros((1, pairs.num_experts + 1), np.int32))
        pairs.multiply(staging.arenas[0], layout.kernel, staging.group, pairs.blocks(table))
        pairs.sum(table)


class _Report:
    """Tells how far the compiler is, if that takes longer than a moment.

    Args:
        draws: a bar; otherwise only the log is told.
    """

    def __init__(self, draws: bool) -> None:
        self._draws, self._bar = draws, None
        self._began, self._told = time.perf_counter(), False

    def __call__(self, done: int, total: int) -> None:
        if not self._told and (done == total or time.perf_counter() - self._began < _QUIET_SECONDS):
            return
        if not self._told:
            self._told = True
            where = kernel_folder()
            _LOG.info("compiling %d kernels for this GPU, once on this computer; they are kept in %s", total, where)
            if self._draws:
                self._bar = tqdm(total=total, desc="Compiling GPU kernels", unit="kernel", dynamic_ncols=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
