"""Times a loaded model as `moesaic run` runs it, token by token, and says where the time goes.

That is by the steps of the serving engine, where the model has them, and by `generate()` otherwise. It knows no file
and no plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.token_stream import TokenStream, token_stream_of
from moesaic.engine.torch_threads import one_torch_thread
from moesaic.kernels import native_seconds

__all__ = ["TimedRuns", "What"]

What = Literal["decode", "prefill"]
_SEED = 0


class TimedRuns:
    """Runs of one kind on one model, each with a new random prompt.

    Args:
        model: a loaded model.
        what: decode (`new_tokens` - 1 tokens, after the first) or prefill (the prompt).
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens to generate.
    """

    def __init__(self, model: PreTrainedModel, what: What, prompt_tokens: int, new_tokens: int) -> None:
        self._model, self.what = model, what
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self._random = torch.Generator().manual_seed(_SEED)
        self._stream = token_stream_of(model)

    @property
    def short_layers(self) -> int:
        """Layers that only the last token of a prompt goes through as a whole, so that they say nothing of others."""
        return int(self.what == "prefill" and self._stream is not None)

    def run(self) -> float:
        """One run; tokens per second."""
        clock = self._generate()
        if self.what == "prefill":
            return self.prompt_tokens / (clock.times[0] - clock.started)
        return (self.new_tokens - 1) / (clock.times[-1] - clock.times[0])

    def profile(self) -> tuple[float, float, float]:
        """Shares of the time outside native calls, in decoder layers, and in those but `short_layers`, in a run."""
        with _time_in_layers(self._model.get_decoder()) as inside:
            clock = self._generate(lambda: (native_seconds(), inside.seconds))
        # marks[0] is taken when the run starts, marks[1] when the first token is there.
        first, last = (0, 1) if self.what == "prefill" else (1, -1)
        times = (clock.started, *clock.times)
        elapsed = times[last] - times[first]
        native, in_layers = (b - a for a, b in zip(clock.marks[first], clock.marks[last], strict=True))
        in_whole_layers = in_layers
        if self._stream is not None:  # whose step is one call
            in_layers, in_whole_layers = (native * share for share in self._shares_of_layers(self._stream))
        return 1.0 - native / elapsed, in_layers / elapsed, in_whole_layers / elapsed

    def _generate(self, mark: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)) -> _Clock:
        vocab_size = int(self._model.config.get_text_config().vocab_size)
        prompt = torch.randint(vocab_size, (1, self.prompt_tokens), generator=self._random)
        clock = _Clock(mark)
        if self._stream is not None:
            _answer(self._stream, prompt[0].tolist(), self.new_tokens, clock)
            return clock
        # No token has this number, so no run ends early.
        config = GenerationConfig(
            max_new_tokens=self.new_tokens, do_sample=False, pad_token_id=0, eos_token_id=vocab_size
        )
        with torch.no_grad():
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=clock
            )
        return clock

    def _shares_of_layers(self, stream: TokenStream) -> tuple[float, float]:
        """Of native calls in what `run` measures, the shares of all layers and of those but `short_layers`.

        In steps that are called by parts.
        """
        runner, token = stream.runner, torch.zeros(1, dtype=torch.int64)
        stream.forget()
        sequence, whole, short, others = runner.new_sequence(), 0.0, 0.0, 0.0
        parts = list(torch.zeros(self.prompt_tokens, dtype=torch.int64).split(runner.max_chunk))
        num_prompt = len(parts)
        if self.what == "decode":
            parts += [token] * (self.new_tokens - 1)
        with one_torch_thread():
            for index, part in enumerate(parts):
                marks = [native_seconds()]
                work = runner.start_prefill([(sequence, part)])
                marks.append(native_seconds())
                work.advance(runner.num_layers - self.short_layers)
                marks.append(native_seconds())
                if self.short_layers:
                    work.advance(self.short_layers)
                    marks.append(native_seconds())
                else:
                    marks.append(marks[-1])
                work.logits()
                marks.append(native_seconds())
                if self.what == "prefill" or index >= num_prompt:
                    embedded, through, ended, chosen = (b - a for a, b in pairwise(marks))
                    whole, short, others = whole + through, short + ended, others + embedded + chosen
        runner.forget(sequence)
        total = whole + short + others
        return (whole + short) / total, whole / total


def _answer(stream: TokenStream, prompt: list[int], num_tokens: int, clock: _Clock) -> None:
    """What `Session` does but for text: a prompt from the beginning, then the likeliest tokens."""
    sampler = RequestSampler(SamplingParams(temperature=0), {}, stream.runner.vocab_size, prompt)
    stream.forget()
    with one_torch_thread():
        clock.begin()
        stream.begin(prompt)
        tokens = stream.generate(prompt, sampler)
        for _ in range(num_tokens):
            next(tokens)
            clock.take()


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Takes the time, and what `mark` says, at the start and when each token has been chosen."""

    def __init__(self, mark: Callable[[], tuple[float, float]]) -> None:
        self._mark = mark
        self.times: list[float] = []
        self.marks: list[tuple[float, float]] = []
        self.started = time.perf_counter()

    def begin(self) -> None:
        """The run starts."""
        self.marks.append(self._mark())
        self.started = time.perf_counter()

    def take(self) -> None:
        """A token has been chosen."""
        self.marks.append(self._mark())
        self.times.append(time.perf_counter())

    def put(self, value: torch.Tensor) -> None:
        """As `generate()` calls it, with the prompt first."""
        if self.marks:
            self.take()
        else:
            self.begin()

    def end(self) -> None:
        """Nothing is left to take."""


@dataclass(slots=True)
class _Stopwatch:
    seconds: float = 0.0


@contextmanager
def _time_in_layers(decoder: Any) -> Iterator[_Stopwatch]:
    """Sum up the time in the layers of a decoder: from its rotary embedding to its last norm, if it has those.

    A hook on the layers themselves would keep them from running as one call; decoders without those parts never do.
    """
    watch = _Stopwatch()
    started: list[float] = []

    def start(*_: object) -> None:
        started[:] = [time.perf_counter()]

    def stop(*_: object) -> None:
        if started:
            watch.seconds += time.perf_counter() - started.pop()

    if hasattr(decoder, "rotary_emb") and hasattr(decoder, "norm"):
        handles = (decoder.rotary_emb.register_forward_hook(start), decoder.norm.register_forward_pre_hook(stop))
    else:
        first, last = decoder.layers[0], decoder.layers[-1]
        handles = (first.register_forward_pre_hook(start), last.register_forward_hook(stop))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
