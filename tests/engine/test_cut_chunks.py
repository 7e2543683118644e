"""Chunks of prompts for which the VRAM does not suffice: smaller pieces give what they would have given at once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import DEVICE, ON_GPU, OPTIONS, TOLERANCE, checkpoint_of, inputs, load_small
from tests.engine.test_lending import Allowed, Subject
from tests.engine.test_streaming import FixedShares

from moesaic.engine.gpu import chunk_limit
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.chunk_limit import ChunkLimit
from moesaic.engine.gpu.prompt_pieces import WantedLogits
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.gpu_runner import GpuStepRunner
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import KernelError, VramError
from moesaic.kernels.triton.grouped_experts import ExpertPairs
from moesaic.kvcache.states import StateLayer
from moesaic.modules.gpu.attention import GpuGqaAttention, GpuMlaAttention
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import GpuStep

SMALL = replace(OPTIONS, graphs=False, max_chunk=32, least_chunk=4)


class Vram:
    """A card with memory for so many tokens in a layer, which ends behind the attention of one of the layers.

    Attributes:
        room: so many tokens; None: any number.
        layer: the one.
        tried: tokens of each pass through that layer.
        held: what a pass that failed had allocated, as long as somebody holds it.
        is_clean: whether nobody did when the allocator was emptied last.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.layer = 1
        self.tried: list[int] = []
        self.held: list[weakref.ref[torch.Tensor]] = []
        self.is_clean = True
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty)
        for attention in (GpuGqaAttention, GpuMlaAttention):
            monkeypatch.setattr(attention, "__call__", self._instead_of(attention.__call__))

    def _empty(self) -> None:
        self.is_clean = all(each() is None for each in self.held)

    def _instead_of(self, real: Any) -> Any:
        def call(module: Any, x: torch.Tensor, step: GpuStep, *rest: Any) -> torch.Tensor:
            attended = real(module, x, step, *rest)
            if module.layer_idx == self.layer and len(x) > 1:
                assert self.is_clean, "memory of a pass that failed is still held"
                self.tried.append(len(x))
                if self.room is not None and len(x) > self.room:
                    self.held = [weakref.ref(attended), weakref.ref(x), weakref.ref(step.input.positions)]
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
            return attended

        return call


@pytest.fixture
def vram(monkeypatch: pytest.MonkeyPatch) -> Vram:
    return Vram(monkeypatch)


def runner_of(family: str, num_layers: int | None = None) -> ModelRunner:
    """Of a small model, whose chunks are cut down to 4 tokens."""
    decoder = GpuDecoder(load_small(family), DEVICE, max_positions=512, dtype=torch.float32, num_layers=num_layers)
    return ModelRunner(decoder, SMALL)


@pytest.fixture(scope="module")
def shared() -> ModelRunner:
    """What was learnt is forgotten by who asks for `runner`."""
    return runner_of("qwen3_moe")


@pytest.fixture
def runner(shared: ModelRunner) -> Iterator[ModelRunner]:
    """As if it were new; every test gives all blocks back."""
    shared.chunk_limit = ChunkLimit(SMALL.max_chunk, SMALL.least_chunk)
    yield shared
    assert shared.pool.num_free == SMALL.num_blocks


def all_logits(family: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint_of(family)[0](ids[None]).logits[0]


FAMILIES = ["qwen3_moe", "qwen3_next", "deepseek_v3"] if ON_GPU else ["qwen3_moe", "qwen3_next"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_that_of_smaller_chunks_from_the_start(family: str, vram: Vram) -> None:
    """To the last bit; the layer before, perhaps with a recurrent state, had seen all tokens when the memory ended."""
    runner, ids = runner_of(family), inputs(1, 24, seed=3)[0]
    whole, cut = runner.new_sequence(), runner.new_sequence()
    runner.prefill([(whole, ids[:3])])
    runner.prefill([(cut, ids[:3])])
    for piece in ids[3:23].split(5):
        wanted = runner.prefill([(whole, piece)])
    vram.tried.clear()
    vram.room = 6
    found = runner.prefill([(cut, ids[3:23])])
    assert vram.tried == [20, 10, 5, 5, 5, 5]
    assert torch.equal(found, wanted)
    assert relative_error(found.cpu(), all_logits(family, ids)[22:23]) < TOLERANCE
    for cache in runner.caches:
        if isinstance(cache, StateLayer):
            for states in (cache.conv, cache.recurrent):
                assert torch.equal(states[cut.state_slot], states[whole.state_slot])
    found = runner.decode([cut], [int(ids[23])])
    assert relative_error(found.cpu(), all_logits(family, ids)[23:]) < TOLERANCE


@pytest.mark.parametrize("wanted", ["last", "all", "none"])
def test_several_sequences_are_cut_where_it_comes(runner: ModelRunner, vram: Vram, wanted: WantedLogits) -> None:
    """Within one of them, or between two; the logits are those of all that were asked for, in order."""
    rows = [inputs(1, length, seed=length)[0] for length in (7, 1, 6)]
    parts = [(runner.new_sequence(), row) for row in rows]
    vram.room = 7
    found = runner.prefill(parts, wanted)
    each = [all_logits("qwen3_moe", row) for row in rows]
    expected = {"last": torch.cat([row[-1:] for row in each]), "all": torch.cat(each), "none": each[0][:0]}[wanted]
    assert found.shape == expected.shape
    assert wanted == "none" or relative_error(found.cpu(), expected) < TOLERANCE
    tokens = [3, 4, 5]
    found = runner.decode([sequence for sequence, _ in parts], tokens)
    each = [all_logits("qwen3_moe", torch.cat([row, torch.tensor([t])])) for row, t in zip(rows, tokens, strict=True)]
    assert relative_error(found.cpu(), torch.cat([row[-1:] for row in each])) < TOLERANCE
    assert runner.chunk_limit.failures == 1
    for sequence, _ in parts:
        sequence.free()


def test_later_prompts_do_not_fail_first_and_it_grows_back(
    runner: ModelRunner, vram: Vram, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_limit, "_PATIENCE", 4)
    runner.chunk_limit = ChunkLimit(SMALL.max_chunk, SMALL.least_chunk)
    caplog.set_level(logging.INFO, "moesaic.gpu")
    ids, sequence = inputs(1, 16, seed=5)[0], runner.new_sequence()

    def tried(room: int | None) -> list[int]:
        vram.tried.clear()
        vram.room = room
        runner.prefill([(sequence, ids)], "none")
        sequence.free()
        return list(vram.tried)

    assert tried(8) == [16, 8, 8]
    assert tried(8) == [8, 8]
    assert tried(8) == [16, 8, 8]  # it was worth a trial
    assert [tried(None) for _ in range(3)] == [[8, 8]] * 3
    assert tried(None) == [16]
    assert (runner.chunk_limit.failures, runner.chunk_limit.size) == (2, 16)
    told = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    warnings = [each for each in told if "compiling" not in each]  # which a card does first
    assert len(warnings) == 1
    for part in ("pieces of 8 tokens", "16 tokens of prompts at once (CUDA out of memory)", "--vram", "--context"):
        assert part in warnings[0]


def test_the_smallest_piece_fails_as_a_whole(runner: ModelRunner, vram: Vram) -> None:
    """What was there before the chunk is still there, and the next prompt is answered."""
    ids, sequence = inputs(1, 20, seed=7)[0], runner.new_sequence()
    runner.prefill([(sequence, ids[:4])])
    vram.room = 3
    with pytest.raises(
        VramError, match=r"the VRAM does not suffice for 4 tokens of prompts at once .* --vram"
    ) as caught:
        runner.prefill([(sequence, ids[4:])])
    assert caught.value.__cause__ is not None and all(each() is None for each in vram.held)  # the error holds nothing
    assert sequence.length == 4
    vram.room = None
    found = runner.prefill([(sequence, ids[4:])])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[-1:]) < TOLERANCE
    sequence.free()


def test_a_recurrent_sequence_is_emptied_if_the_smallest_piece_fails(vram: Vram) -> None:
    runner, ids = runner_of("qwen3_next"), inputs(1, 12, seed=7)[0]
    sequence = runner.new_sequence()
    runner.prefill([(sequence, ids[:2])])
    vram.room = 3
    with pytest.raises(VramError):
        runner.prefill([(sequence, ids[2:])])
    assert (sequence.length, runner.states.num_free, runner.pool.num_free) == (0, SMALL.max_batch, SMALL.num_blocks)
    vram.room = None
    found = runner.prefill([(sequence, ids)])
    assert relative_error(found.cpu(), all_logits("qwen3_next", ids)[-1:]) < TOLERANCE


def test_pieces_layer_by_layer_with_steps_of_others_between(runner: ModelRunner, vram: Vram) -> None:
    ids, other = inputs(1, 16, seed=8)[0], inputs(1, 6, seed=9)[0]
    sequence, decoding = runner.new_sequence(), runner.new_sequence()
    runner.prefill([(decoding, other[:4])])
    vram.room = 8
    work = runner.start_prefill([(sequence, ids)])
    assert work.num_layers_left == 2
    work.advance(1)
    assert work.num_layers_left == 1
    work.advance(1)  # fails, and the first of two layers of the first of two pieces is done instead
    assert work.num_layers_left == 3
    found = runner.decode([decoding], [int(other[4])])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", other)[4:5]) < TOLERANCE
    work.advance(2)
    assert work.num_layers_left == 1
    with pytest.raises(KernelError, match="1 layers are left"):
        work.logits()
    work.advance(5)
    assert relative_error(work.logits().cpu(), all_logits("qwen3_moe", ids)[-1:]) < TOLERANCE
    work = runner.start_prefill([(decoding, ids)])  # two pieces from the beginning
    assert work.num_layers_left == 4
    work.advance(3)
    work.abandon()
    assert (decoding.length, work.num_layers_left) == (5, 0)
    found = runner.decode([decoding], [int(other[5])])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", other)[5:]) < TOLERANCE
    for each in (sequence, decoding):
        each.free()


def test_layers_on_the_cpu_behind_pieces(vram: Vram) -> None:
    runner, ids = runner_of("qwen3_moe", num_layers=1), inputs(1, 17, seed=4)[0]
    vram.layer, vram.room = 0, 4
    sequence = runner.new_sequence()
    runner.prefill([(sequence, ids[:1])])
    found = runner.prefill([(sequence, ids[1:16])])
    assert vram.tried == [15, 8, 4, 4, 4, 3]
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[15:16]) < TOLERANCE
    found = runner.decode([sequence], [int(ids[16])])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[16:]) < TOLERANCE


def test_no_memory_to_begin_with(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings find no room; what is learnt holds for the last failure too, after which nothing was appended."""
    ids, sequence, embed = inputs(1, 16, seed=6)[0], runner.new_sequence(), runner.decoder.embed
    most = 4

    def too_large(token_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if len(token_ids) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return embed(token_ids, out)

    monkeypatch.setattr(runner.decoder, "embed", too_large)
    found = runner.prefill([(sequence, ids)])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[-1:]) < TOLERANCE
    assert (runner.chunk_limit.size, runner.chunk_limit.failures) == (4, 2)
    sequence.free()
    most = 3
    with pytest.raises(VramError, match="4 tokens of prompts"):
        runner.start_prefill([(sequence, ids)])
    assert sequence.length == 0


def test_an_engine_does_not_notice(runner: ModelRunner, vram: Vram) -> None:
    """Neither of the two answers is tried again, whose prompts go together in pieces."""
    stock, prompts = checkpoint_of("qwen3_moe")[0], [inputs(1, length, seed=length)[0] for length in (9, 14)]
    engine = Engine(GpuStepRunner(runner), None, GenerationDefaults({"do_sample": False}))
    vram.room = 8
    answers = [Completion(0) for _ in prompts]
    for index, ids in enumerate(prompts):
        engine.add(str(index), ids.tolist(), SamplingParams(max_tokens=2, temperature=0))
    while engine.has_work:
        for name, chunk in engine.step():
            answers[int(name)].add(chunk)
    for ids, answer in zip(prompts, answers, strict=True):
        wanted = stock.generate(ids[None], do_sample=False, max_new_tokens=2)[0, len(ids) :].tolist()
        assert (answer.token_ids, answer.finish_reason) == (wanted, "length")
    assert runner.chunk_limit.failures > 0
    engine.close()


def test_streamed_experts_after_a_failure_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups on their way are forgotten, their places are free, and those of the pieces are the right ones."""
    model = load_small("qwen3_moe")
    decoder = GpuDecoder(model, DEVICE, max_positions=512, dtype=torch.float32)
    staging = StagingBuffers([each for each in decoder.routed if each is not None], 4, DEVICE)
    runner = attach_runner(model, ModelRunner(decoder, SMALL, None, staging, FixedShares([*range(8)]))).runner
    ids, multiply, calls = inputs(1, 20, seed=2)[0], ExpertPairs.multiply, list[int]()

    def fails(self: ExpertPairs, *rest: Any) -> None:
        calls.append(self._num_tokens)
        if self._num_tokens > 10 and len(calls) == 4:  # groups before it are done, others on their way
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        multiply(self, *rest)

    monkeypatch.setattr(ExpertPairs, "multiply", fails)
    sequence = runner.new_sequence()
    found = runner.prefill([(sequence, ids)], "all")
    assert calls[:4] == [20] * 4 and set(calls[4:]) == {10} and runner.chunk_limit.failures == 1
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)) < TOLERANCE


@pytest.mark.parametrize("why", ["activations", "lots"])
def test_a_long_chunk_that_nothing_can_be_lent_for(why: str, vram: Vram) -> None:
    """Because the allocator holds too much, or because other programs have what could have been lent."""
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    lending, runner, allowed = subject.lending, subject.runner, Allowed()
    runner.chunk_limit = ChunkLimit(32, 4)
    lending.lots = replace(lending.lots, chunk=10, long_chunk=32, long=2 if why == "activations" else 10_000)
    lending._allow = allowed
    allowed.held = 1 << 60
    ids, sequence = inputs(1, 20, seed=1)[0], runner.new_sequence()
    found = runner.prefill([(sequence, ids)])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[-1:]) < TOLERANCE
    assert vram.tried == [10, 10] and runner.chunk_limit.size == 10
    assert not lending._streams and not lending._lent_out and subject.check_slots() <= lending.num_slots


def test_what_was_lent_for_a_chunk_that_failed_comes_back(vram: Vram) -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    lending, runner, allowed = subject.lending, subject.runner, Allowed()
    runner.chunk_limit = ChunkLimit(32, 4)
    lending.lots = replace(lending.lots, chunk=10, long_chunk=32, long=2)
    lending._allow = allowed
    vram.room = 10
    ids, sequence = inputs(1, 20, seed=1)[0], runner.new_sequence()
    found = runner.prefill([(sequence, ids)])
    assert relative_error(found.cpu(), all_logits("qwen3_moe", ids)[-1:]) < TOLERANCE
    assert vram.tried == [20, 10, 10]
    assert allowed.calls == [2 * lending.lots.lot_bytes] and not lending._streams
    for _ in range(16):
        lending.after_step()
    assert allowed.calls[-1] == 0 and lending.nbytes == lending.lots.nbytes
    assert subject.check_slots() <= lending.num_slots
