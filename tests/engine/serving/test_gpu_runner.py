"""Models on a GPU behind the scheduler's interface: in Triton's interpreter where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import (
    DEVICE,
    ON_GPU,
    OPTIONS,
    TOLERANCE,
    all_resident,
    checkpoint_of,
    eager_cache,
    inputs,
    on_gpu,
)

from moesaic.engine.gpu import expert_cache
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.gpu_runner import GpuStepRunner
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import ExpertTimeoutError, KernelError
from moesaic.modules.gpu.decoder import GpuDecoder


def expected(family: str, *rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([checkpoint_of(family)[0](row[None]).logits[:, -1] for row in rows])


CASES = [("qwen3_moe", None, "none"), ("qwen3_moe", 1, "none"), ("qwen3_moe", None, "cache"), ("gpt_oss", None, "all")]


@pytest.mark.parametrize(("family", "num_layers", "slots"), CASES if ON_GPU else CASES[:3])
def test_a_prefill_in_pieces_with_steps_of_others_between(family: str, num_layers: int | None, slots: str) -> None:
    chosen = {"cache": {"slots": eager_cache}, "all": {"slots": all_resident}, "none": {}}[slots]
    runner = GpuStepRunner(on_gpu(family, ON_GPU, num_layers=num_layers, **chosen).runner)
    assert runner.num_layers == 2
    assert runner.shares_prefixes == (num_layers is None)
    first, second, other = inputs(1, 9)[0], inputs(1, 5, seed=1)[0], inputs(1, 7, seed=2)[0]
    decoding, *filling = (runner.new_sequence() for _ in range(3))
    work = runner.start_prefill([(decoding, other[:5])])
    work.advance(5)
    work = runner.start_prefill([(filling[0], first), (filling[1], second)])
    assert work.num_layers_left == 2
    work.advance(1)
    assert work.num_layers_left == 1
    with pytest.raises(KernelError, match="1 layers are left"):
        work.logits()
    logits = runner.decode([decoding], [int(other[5])])
    assert relative_error(logits, expected(family, other[:6])) < TOLERANCE
    work.advance(1)
    assert relative_error(work.logits(), expected(family, first, second)) < TOLERANCE
    logits = runner.decode([filling[0], decoding], [3, int(other[6])])
    rows = torch.cat([first, torch.tensor([3])]), other
    assert relative_error(logits, expected(family, *rows)) < TOLERANCE
    assert logits.device.type == "cpu"
    hits, lookups = runner.expert_uses()
    assert lookups == (3 * runner._runner.decoder.top_k * 2 if slots == "cache" else 0)  # of three tokens' steps
    assert hits <= lookups
    assert runner._runner.steps.graphs.expected == 3  # who is filled in will decode, too
    for sequence in (decoding, *filling):
        runner.forget(sequence)
    assert runner.pool.num_free == OPTIONS.num_blocks


def test_an_abandoned_prefill_leaves_what_was_there() -> None:
    runner = GpuStepRunner(on_gpu("qwen3_moe").runner)
    ids, sequence = inputs(1, 9)[0], runner.new_sequence()
    runner.start_prefill([(sequence, ids[:4])]).advance(2)
    work = runner.start_prefill([(sequence, inputs(1, 30, seed=3)[0])])
    work.advance(1)
    work.abandon()
    assert sequence.length == 4
    work = runner.start_prefill([(sequence, ids[4:])])
    work.advance(2)
    assert relative_error(work.logits(), expected("qwen3_moe", ids)) < TOLERANCE


def test_more_sequences_than_a_graph_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = GpuStepRunner(on_gpu("qwen3_moe", ON_GPU, replace(OPTIONS, max_batch=2)).runner, max_batch=5)
    rows = [inputs(1, 3 + index, seed=index)[0] for index in range(3)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.start_prefill([(sequence, row[:-1]) for sequence, row in zip(sequences, rows, strict=True)]).advance(2)
    last = [int(row[-1]) for row in rows]
    decode, calls = runner._runner.decode, list[int]()

    def fail_second(*args: object, **options: bool) -> torch.Tensor:
        calls.append(len(args))
        if len(calls) == 2:
            raise ExpertTimeoutError("too slow")
        return decode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner._runner, "decode", fail_second)
    with pytest.raises(ExpertTimeoutError):
        runner.decode(sequences, last)
    assert [sequence.length for sequence in sequences] == [2, 3, 4]
    assert relative_error(runner.decode(sequences, last), expected("qwen3_moe", *rows)) < TOLERANCE


def test_the_likeliest_tokens_come_without_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, all or nothing; none where logits are no numbers."""
    runner = GpuStepRunner(on_gpu("qwen3_moe", ON_GPU, replace(OPTIONS, max_batch=2)).runner, max_batch=5)
    rows = [inputs(1, 3 + index, seed=index)[0] for index in range(3)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.start_prefill([(sequence, row[:-1]) for sequence, row in zip(sequences, rows, strict=True)]).advance(2)
    while runner._runner.steps.prepare(2):
        pass
    monkeypatch.setattr(runner._runner.steps, "_fetch", None)  # logits stay where they are
    launched: list[int] = []
    runner.on_launch = lambda: launched.append(runner._runner.server.next_request)
    before = runner._runner.server.next_request
    found = runner.decode_likeliest(sequences, [int(row[-1]) for row in rows])
    assert launched == [before, before + 2]  # before the requests of each batch are served
    assert found == expected("qwen3_moe", *rows).argmax(-1).tolist()
    assert [sequence.length for sequence in sequences] == [3, 4, 5]
    with pytest.raises(KernelError):
        runner.decode_likeliest(sequences, [1, 2, 10**7])
    assert [sequence.length for sequence in sequences] == [3, 4, 5]
    runner._runner.decoder.norm.weight.fill_(torch.nan)
    assert runner.decode_likeliest(sequences, [1, 2, 3]) == [-1] * 3


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_an_engine_on_it(family: str) -> None:
    stock = checkpoint_of(family)[0]
    runner = GpuStepRunner(on_gpu(family, ON_GPU, OPTIONS).runner)
    engine = Engine(runner, None, GenerationDefaults({"do_sample": False}))
    while engine.prepare():
        pass
    buckets = runner._runner.steps.buckets
    assert [size for size in sorted(buckets) if buckets[size].is_ready] == ([1, 2, 4] if ON_GPU else [])
    prompts = [inputs(1, 5, seed=index)[0].tolist() for index in range(2)]
    answers = [Completion(0) for _ in prompts]
    for index, ids in enumerate(prompts):
        engine.add(str(index), ids, SamplingParams(max_tokens=3, temperature=0))
    while engine.has_work:
        for name, chunk in engine.step():
            answers[int(name)].add(chunk)
    for ids, answer in zip(prompts, answers, strict=True):
        wanted = stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=3)[0, len(ids) :].tolist()
        assert answer.token_ids == wanted
    assert engine.stats().blocks_free == OPTIONS.num_blocks
    assert runner._num_sequences == 0


def test_while_nobody_asks_the_cache_gets_what_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, whatever the budget of steps says; and what is in the slots is right."""
    num_slots = 6

    def filled(decoder: GpuDecoder) -> ExpertSlots:
        cache = ExpertCache([each for each in decoder.routed if each is not None], num_slots, DEVICE)
        cache.fill()
        return ExpertSlots(cache=cache)

    runner = GpuStepRunner(on_gpu("qwen3_moe", ON_GPU, slots=filled).runner)
    cache, server = runner._runner.slots.cache, runner._runner.server
    monkeypatch.setattr(expert_cache, "_CATCHING_UP_BYTES", 2 * cache.slot_bytes + 1)
    while runner._runner.steps.prepare(1):
        pass
    assert not runner.prepare(1)  # nothing was used
    ids, sequence = inputs(1, 12)[0], runner.new_sequence()
    runner.start_prefill([(sequence, ids[:3])]).advance(2)
    for token in ids[3:7].tolist():  # too few for the cache to be asked
        runner.decode([sequence], [token])
    uses = server.uses.numpy().copy()
    at_first = {(int(layer), int(expert)) for layer, expert in zip(*np.nonzero(cache.policy.slot_of >= 0), strict=True)}
    unused = sum(uses[each] == 0 for each in at_first)
    pieces = 0
    while runner.prepare(1):
        pieces += 1
    held = cache.policy.slot_of >= 0
    copied = cache.statistics().copied
    assert copied >= unused >= 1 and pieces == -(-copied // 2)
    assert held.sum() == num_slots and np.array_equal(cache._tables.cpu().numpy(), cache.policy.slot_of)
    assert uses[held].min() >= 1  # more experts were used than there are slots
    assert uses[held].max() == uses.max() and uses[~held].max() < uses[held].min() + 4  # the policy's advantage
    hits, lookups = runner.expert_uses()
    rows = [runner.decode([sequence], [token]).clone() for token in ids[7:].tolist()]
    assert relative_error(torch.cat(rows[-1:]), expected("qwen3_moe", ids)) < TOLERANCE
    while runner.prepare(1):  # what was used is told
        pass
    more = np.array(runner.expert_uses()) - (hits, lookups)
    assert 0 < more[0] <= more[1] == 5 * uses.sum() // 4
