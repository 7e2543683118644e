"""Times decode and prefill on a runner, and says where the time of a step goes. It knows no file and no plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.kvcache.paged import PagedSequence

__all__ = ["GpuTimedRuns", "StepShares", "StepTimes", "vram_bandwidth"]

_SEED = 0
_PROBE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StepShares:
    """Where the time of a decode step goes, medians over steps, in seconds.

    Attributes:
        step: from the call to the logits.
        experts: the CPU computes experts, all layers together.
        between: the CPU waits for the next request, all layers together: attention, router and the hand-off.
        ends: the rest: launch, first and last layer, head.
    """

    step: float
    experts: float
    between: float
    ends: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When what happened in a decode step, in nanoseconds of the monotonic clock.

    Attributes:
        began: it was called for.
        ended: its token had been chosen.
        layers: of each layer whose experts the CPU computed, when it saw the request, when it had answered, and when it
            had computed those that come a layer late, too.
    """

    began: int
    ended: int
    layers: tuple[tuple[int, int, int], ...]


class GpuTimedRuns:
    """Runs of one kind on one runner, each with new random prompts.

    Args:
        runner: of a loaded model.
        what: decode (`new_tokens` - 1 tokens, after the first) or prefill (the prompt).
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens to generate.
        batch: sequences that run together.
        chunk: tokens of a prompt that go through the layers at once; as many as the runner lets if None.
    """

    def __init__(
        self,
        runner: ModelRunner,
        what: Literal["decode", "prefill"],
        prompt_tokens: int,
        new_tokens: int,
        batch: int = 1,
        chunk: int | None = None,
    ) -> None:
        self.runner, self.what = runner, what
        self.prompt_tokens, self.new_tokens, self.batch = prompt_tokens, new_tokens, batch
        self._chunk = runner.options.max_chunk if chunk is None else chunk
        self._random = torch.Generator().manual_seed(_SEED)
        self._vocab = runner.decoder.vocab_size

    def run(self) -> float:
        """One run; tokens per second of all sequences together."""
        with self._sequences() as sequences:
            started = time.perf_counter()
            tokens = self._prefill(sequences)
            if self.what == "prefill":
                return self.batch * self.prompt_tokens / (time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(self.new_tokens - 1):
                tokens = self._step(sequences, tokens)
            return self.batch * (self.new_tokens - 1) / (time.perf_counter() - started)

    def steps_until(self, is_done: Callable[[], bool]) -> None:
        """Decode steps after a prompt, as `run` has them, which may be ended early; no times are taken.

        Args:
            is_done: called after each; whether it was the last.
        """
        with self._sequences() as sequences:
            tokens = self._prefill(sequences)
            for _ in range(self.new_tokens - 1):
                tokens = self._step(sequences, tokens)
                if is_done():
                    return

    def timed_steps(self, count: int, before_step: Callable[[], None] = lambda: None) -> list[StepTimes]:
        """Decode steps after a prompt, with the times at which the CPU was asked.

        Args:
            count: how many.
            before_step: called before each.
        """
        hand_off, server = self.runner.hand_off, self.runner.server
        num_layers = 0 if server is None else len(server.layers)
        # All that is noted is looked at afterwards: what is done between steps would be measured, too.
        layers = torch.zeros(count, num_layers, 3, dtype=torch.int64)
        spans: list[tuple[int, int]] = []
        with self._sequences() as sequences:
            tokens = self._prefill(sequences)
            try:
                for index in range(count):
                    before_step()
                    hand_off.times = layers[index] if num_layers else None
                    began = time.perf_counter_ns()
                    tokens = self._step(sequences, tokens)
                    spans.append((began, time.perf_counter_ns()))
            finally:
                hand_off.times = None
        return [
            StepTimes(began, ended, tuple((seen, end, done) for seen, end, done in own))
            for (began, ended), own in zip(spans, layers.tolist(), strict=True)
        ]

    def profile(self) -> StepShares:
        """Take a run of decode steps apart."""
        rows: list[tuple[float, float, float]] = []
        for step in self.timed_steps(self.new_tokens - 1):
            experts = sum(done - seen for seen, _, done in step.layers)
            between = sum(after[0] - before[2] for before, after in pairwise(step.layers))
            rows.append(((step.ended - step.began) / 1e9, experts / 1e9, between / 1e9))
        step_seconds, experts_seconds, between_seconds = (
            statistics.median(column) for column in zip(*rows, strict=True)
        )
        return StepShares(
            step_seconds, experts_seconds, between_seconds, step_seconds - experts_seconds - between_seconds
        )

    @property
    def short_layers(self) -> int:
        """Layers that only the last token of a prompt goes through as a whole, so that they say nothing of others."""
        return int(self.what == "prefill" and self.prompt_tokens > 1 and self.runner.decoder.tail is None)

    def layer_share(self) -> float:
        """Share of the time that layers take, of what `run` measures, but `short_layers`: the rest is the head, ..."""
        if self.what == "prefill":
            return self._share_of_prompt()
        per_pass = self.batch / self.run()
        return max(0.0, 1.0 - self.runner.head_seconds(self.batch) / per_pass)

    def _share_of_prompt(self) -> float:
        """The same, from a run whose layers are called apart."""
        inside, total = 0.0, 0.0
        with self._sequences() as sequences:
            for sequence in sequences:
                for piece in torch.randint(self._vocab, (self.prompt_tokens,), generator=self._random).split(
                    self._chunk
                ):
                    marks = [time.perf_counter()]
                    work = self.runner.start_prefill([(sequence, piece)])
                    marks.append(time.perf_counter())
                    work.advance(work.num_layers_left - self.short_layers)
                    if self.runner.decoder.device.type == "cuda":
                        torch.cuda.synchronize()
                    marks.append(time.perf_counter())
                    while work.num_layers_left:
                        work.advance(work.num_layers_left)
                    int(work.logits().argmax())
                    inside += marks[2] - marks[1]
                    total += time.perf_counter() - marks[0]
        return inside / total

    def _sequences(self) -> _Sequences:
        return _Sequences([self.runner.new_sequence() for _ in range(self.batch)])

    def _prefill(self, sequences: list[PagedSequence]) -> list[int]:
        """Prompts through the layers; the likeliest next tokens."""
        tokens = []
        for sequence in sequences:
            prompt = torch.randint(self._vocab, (self.prompt_tokens,), generator=self._random)
            for piece in prompt.split(self._chunk):
                logits = self.runner.prefill([(sequence, piece)])
            tokens.append(int(logits.argmax(-1)))
        return tokens

    def _step(self, sequences: list[PagedSequence], tokens: list[int]) -> list[int]:
        return self.runner.decode_likeliest(sequences, tokens)


class _Sequences:
    """Sequences that give their blocks back at the end."""

    def __init__(self, sequences: list[PagedSequence]) -> None:
        self._sequences = sequences

    def __enter__(self) -> list[PagedSequence]:
        return self._sequences

    def __exit__(self, *_: object) -> None:
        for sequence in self._sequences:
            sequence.free()


def vram_bandwidth(device: torch.device, repeat: int = 10) -> float:
    """Bytes per second that the GPU reads from its memory: the median of sums over 1 GiB."""
    data = torch.ones(_PROBE_BYTES // 4, device=device)
    times = []
    for _ in range(repeat + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del data
    torch.cuda.empty_cache()  # it is no part of a model's peak
    torch.cuda.reset_peak_memory_stats(device)
    return _PROBE_BYTES / float(statistics.median(times[1:]))
