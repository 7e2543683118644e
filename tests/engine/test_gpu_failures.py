"""Steps of a model on a GPU that fail: who is told what, and that the next one is as if nothing had been."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, TOLERANCE, checkpoint_of, inputs, on_gpu, some_uploads

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.gpu_runner import GpuStepRunner
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import ExpertTimeoutError, GenerationError, KernelError
from moesaic.kvcache.paged import PagedSequence

IDS = inputs(1, 4)[0]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """All that is broken in it is mended after each test."""
    return on_gpu("qwen3_moe", ON_GPU).runner


@pytest.fixture(scope="module")
def sequence(runner: ModelRunner) -> PagedSequence:
    """Every test leaves it as it was."""
    return prefilled(runner)


def prefilled(runner: ModelRunner) -> PagedSequence:
    """All but the last of IDS."""
    sequence = runner.new_sequence()
    runner.prefill([(sequence, IDS[:-1])])
    return sequence


def step_is_right(runner: ModelRunner, sequence: PagedSequence) -> bool:
    """Whether a step with the last of IDS gives what stock transformers gives."""
    assert sequence.length == len(IDS) - 1
    logits = runner.decode([sequence], [int(IDS[-1])]).cpu()
    sequence.truncate(len(IDS) - 1)
    with torch.no_grad():
        return relative_error(logits, checkpoint_of("qwen3_moe")[0](IDS[None]).logits[:, -1]) < TOLERANCE


class NoMemory:
    """Calls of a function, the first of which find no memory."""

    def __init__(self, function: Any, count: int = 1) -> None:
        self._function, self._left = function, count

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._left:
            self._left -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more to say.")
        return self._function(*args, **options)


@pytest.mark.parametrize("uploads", [{}, {"uploads": some_uploads}], ids=["alone", "uploads"])
def test_a_cpu_that_does_not_answer_lets_the_gpu_go(uploads: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU polls for a bounded time; then the process hears of it, and the next step is right."""
    runner = on_gpu("qwen3_moe", ON_GPU, **uploads).runner
    runner.hand_off.exchange.set_timeout(0.2 if ON_GPU else 5e-6)
    sequence = prefilled(runner)
    assert runner.server is not None
    assert step_is_right(runner, sequence)
    with monkeypatch.context() as stalled:
        stalled.setattr(runner.server, "serve", lambda *args, **options: None)
        began = time.monotonic()
        if ON_GPU:  # the graph is captured by steps that are answered
            stalled.undo()
            runner.steps.bucket(1)
            stalled.setattr(runner.server, "serve", lambda *args, **options: None)
        with pytest.raises(ExpertTimeoutError, match="the CPU did not answer the GPU within"):
            runner.decode([sequence], [int(IDS[-1])])
        assert time.monotonic() - began < 60
    if runner.uploads is not None:  # numbers of requests begin anew, and those of what has arrived
        landing = runner.uploads.landing
        assert not landing.inner_arrived.any() and not landing.down_arrived.any()
    assert step_is_right(runner, sequence)
    assert not uploads or runner.uploads.statistics().brought > 0


def test_no_memory_for_a_step_costs_that_step_only(
    runner: ModelRunner, sequence: PagedSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(runner.decoder, "embed", NoMemory(runner.decoder.embed))
        with pytest.raises(GenerationError, match=r"a decode step of 1 sequences \(CUDA out of memory\).* --vram"):
            runner.decode([sequence], [int(IDS[-1])])
    assert step_is_right(runner, sequence)


def test_no_memory_for_a_prompt_costs_that_prompt_only(
    runner: ModelRunner, sequence: PagedSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = runner.pool.num_free
    for function in ("embed", "run", "logits"):
        with monkeypatch.context() as full:
            full.setattr(runner.decoder, function, NoMemory(getattr(runner.decoder, function)))
            with pytest.raises(GenerationError, match=r"the VRAM does not suffice for .* give more of it with --vram"):
                runner.prefill([(sequence, inputs(1, 20)[0])])
        assert (runner.pool.num_free, sequence.length) == (free, len(IDS) - 1)
    assert step_is_right(runner, sequence)


def test_an_engine_goes_on_without_the_request_that_found_no_memory(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first failure is tried again; a second one ends the request, and the next is answered."""
    stock = checkpoint_of("qwen3_moe")[0]
    engine = Engine(GpuStepRunner(runner), None, GenerationDefaults({"do_sample": False}))
    expected = stock.generate(IDS[None], do_sample=False, max_new_tokens=1)[0, len(IDS) :].tolist()
    found = {}
    for name, failures in (("ended", 2), ("retried", 1)):
        with monkeypatch.context() as full:
            full.setattr(runner.decoder, "run", NoMemory(runner.decoder.run, failures))
            engine.add(name, IDS.tolist(), SamplingParams(max_tokens=1, temperature=0))
            answer = found[name] = Completion(0)
            while engine.has_work:
                for _, chunk in engine.step():
                    answer.add(chunk)
    assert found["retried"].token_ids == expected
    assert (found["ended"].token_ids, found["ended"].finish_reason) == ([], "error")


def test_layers_on_the_cpu_that_fail_leave_sequences_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a split the GPU's part of a step is done when the CPU's fails, here for the second sequence."""
    runner = on_gpu("qwen3_moe", ON_GPU, num_layers=1).runner
    sequences = [prefilled(runner) for _ in range(2)]
    tail = runner.decoder.tail
    assert tail is not None
    calls, through = itertools.count(), type(tail).__call__

    def fails(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise KernelError("the test's")
        return through(self, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(type(tail), "__call__", fails)
        with pytest.raises(KernelError, match="the test's"):
            runner.decode(sequences, [int(IDS[-1])] * 2)
    assert sequences[0].length == len(IDS) - 1
    assert step_is_right(runner, sequences[0])
