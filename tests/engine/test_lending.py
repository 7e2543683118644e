"""Memory that the cache of experts lends: nothing is lost, every slot holds what its table says, and all comes back."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.fake_memory import FakeMemory
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import DEVICE, ON_GPU, OPTIONS, TOLERANCE, checkpoint_of, inputs, load_small
from tests.engine.test_streaming import FixedShares

from moesaic.engine.gpu import lending as lending_module
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.virtual_memory import MemoryDriver
from moesaic.engine.loader import Prepared, load, this_computer
from moesaic.engine.subjects import prepare_synthetic
from moesaic.errors import GenerationError, KernelError
from moesaic.kernels.experts import PackedExperts
from moesaic.kvcache.paged import KvShape, pool_bytes
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import copy_experts, slot_bytes, slot_layout
from moesaic.placement.lots import VramLots
from moesaic.placement.vram import DRIVER_BYTES
from moesaic.quant import get_format

NUM_STAGED = 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_driver() -> MemoryDriver:
    if not ON_GPU:
        return FakeMemory()
    from moesaic.engine.gpu.cuda_memory import CudaMemory

    return CudaMemory(DEVICE)


def lots_of(block_bytes: int, expert_bytes: int, num_experts: int, lot: int, first_blocks: int, slots: int) -> VramLots:
    """Room for some slots beside the first blocks and prefill's buffers; blocks could get all but the least."""
    keys, staging = -(-first_blocks * block_bytes // lot), -(-NUM_STAGED * expert_bytes // lot)
    total, least = keys + staging + -(-slots * expert_bytes // lot), -(-expert_bytes // lot)
    return VramLots(
        total=total,
        keys=keys,
        staging=staging,
        least=least,
        most_experts=-(-num_experts * expert_bytes // lot),
        block_bytes=block_bytes,
        num_blocks=(total - staging - least) * lot // block_bytes,
        first_blocks=first_blocks,
        rotary_positions=512,
        expert_bytes=expert_bytes,
        num_experts=num_experts,
        lot_bytes=lot,
    )


class Subject:
    """A model whose memory is lent, with a clock of its own."""

    def __init__(self, family: str, first_blocks: int, slots: int) -> None:
        self.model, self.clock = load_small(family), Clock()
        decoder = GpuDecoder(self.model, DEVICE, max_positions=512, dtype=torch.float32)
        self.experts: list[PackedExperts] = [each for each in decoder.routed if each is not None]
        shapes = [layer.attention.cache_shape for layer in decoder.layers]
        block = pool_bytes(
            [shape for shape in shapes if isinstance(shape, KvShape)], 1, OPTIONS.block_size, torch.float32
        )
        size, count = max(map(slot_bytes, self.experts)), sum(each.num_experts for each in self.experts)
        driver = a_driver()
        lot = driver.granularity
        if ON_GPU:  # lots are large beside these experts: as many blocks and slots as there are lots
            first_blocks, slots = lot // block, 3 * lot // size
        self.lots = lots_of(block, size, count, lot, first_blocks, slots)
        self.lending = VramLending(driver, self.lots, self.clock)
        policy = PromotionPolicy(len(self.experts), self.experts[0].num_experts, self.lending.num_slots, share=1.0)
        arena = self.lending.experts
        self.cache = ExpertCache(self.experts, policy.num_slots, DEVICE, policy, 1, is_guarded=False, arena=arena)
        self.lending.lend_from(self.cache)
        self.cache.fill()
        staging = StagingBuffers(self.experts, NUM_STAGED, DEVICE, self.lending.staging)
        options = replace(OPTIONS, max_positions=512, graphs=ON_GPU)
        self.runner = ModelRunner(
            decoder, options, ExpertSlots(cache=self.cache), staging, FixedShares([1, 3]), lending=self.lending
        )
        attach_runner(self.model, self.runner)
        self.hits, self._serve = 0, self.runner.server.serve
        if not ON_GPU:
            self.runner.server.serve = self._counted  # type: ignore[method-assign]

    def _counted(self, num_tokens: int, **more: Any) -> None:
        """Serve a layer, and count the choices that the CPU was not asked for."""
        self._serve(num_tokens, **more)
        self.hits += int((self.runner.server.mailbox.experts[:num_tokens] < 0).sum())

    def check_slots(self) -> int:
        """Every slot in the tables holds the bytes of its expert; how many there are."""
        self.cache.wait()
        tables = self.cache._tables.cpu().numpy()
        assert np.array_equal(tables, self.cache.policy.slot_of)
        for layer, experts in enumerate(self.experts):
            layout = slot_layout(experts, DEVICE)
            one = torch.zeros(layout.nbytes, dtype=torch.uint8, device=DEVICE)
            for expert in np.flatnonzero(tables[layer] >= 0):
                slot = int(tables[layer, expert])
                assert slot < self.lending.num_slots, "a slot without memory"
                copy_experts(experts, int(expert), 1, layout, one, 0)
                assert torch.equal(self.cache._slot(slot)[: layout.nbytes], one)
        slots = tables[tables >= 0]
        assert len(set(slots.tolist())) == len(slots)
        return len(slots)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"] if ON_GPU else ["qwen3_moe"])
def test_a_pool_that_grows_in_decode_and_gives_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "_STEPS", 1)
    monkeypatch.setattr(lending_module, "_IDLE_LOOKS", 1)
    subject = Subject(family, first_blocks=2, slots=9)
    runner, lending, stock = subject.runner, subject.lending, checkpoint_of(family)[0]
    size, first = OPTIONS.block_size, lending.figures()
    at_first = subject.check_slots()
    assert at_first == first.num_slots == runner.slots.cache.policy.num_slots and first.staging
    other, sequence = runner.new_sequence(), runner.new_sequence()
    other.append((first.num_blocks - 2) * size)  # two blocks are left; on a card a lot has many
    ids = inputs(1, 2 * size + 4, seed=5)[0]
    prompt = 2 * size - 2
    logits = [runner.prefill([(sequence, ids[:prompt])]).cpu()]
    for token in ids[prompt:].tolist():
        logits.append(runner.decode([sequence], [token]).clone().cpu())
    with torch.no_grad():
        expected = stock(ids[None]).logits[0, prompt - 1 :]
    assert relative_error(torch.cat(logits), expected) < TOLERANCE
    grown = lending.figures()
    assert grown.num_blocks > first.num_blocks and runner.pool.end > first.num_blocks
    assert subject.check_slots() <= grown.num_slots
    for each in (sequence, other):
        each.free()
    subject.clock.now = 10.0
    short = inputs(1, 6, seed=6)[0]
    runner.prefill([(sequence, short[:2])])
    after = [runner.decode([sequence], [token]).clone().cpu() for token in short[2:].tolist()]
    with torch.no_grad():
        expected = stock(short[None]).logits[0, 2:]
    assert relative_error(torch.cat(after), expected) < TOLERANCE
    back = lending.figures()
    assert subject.check_slots() <= back.num_slots
    if not ON_GPU:  # where one lot holds all experts they want nothing back
        assert back.num_blocks == first.num_blocks == runner.pool.num_backed and not back.staging
        assert grown.num_slots < back.num_slots == subject.lots.first_slots > first.num_slots  # prefill's are lent too
        assert subject.check_slots() == back.num_slots
    statistics = subject.cache.statistics()
    assert statistics.hit_rate > 0.2 and statistics.num_slots == back.num_slots
    assert ON_GPU or statistics.hit_rate == subject.hits / int(subject.cache.policy.uses.sum())
    sequence.free()
    work = runner.start_prefill([(sequence, inputs(1, 12, seed=7)[0])])
    assert lending.figures().staging and subject.check_slots() <= lending.num_slots
    work.advance(1)
    runner.lending.after_step()
    assert lending.figures().staging  # it is not over
    work.advance(1)
    with torch.no_grad():
        expected = stock(inputs(1, 12, seed=7)).logits[0, -1:]
    assert relative_error(work.logits().cpu(), expected) < TOLERANCE
    runner.lending.after_step()
    assert ON_GPU or not lending.figures().staging


def test_what_cannot_be_lent_is_refused_and_nothing_changes() -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    runner, lending = subject.runner, subject.lending
    sequence = runner.new_sequence()
    with pytest.raises(GenerationError, match="cache is full"):
        sequence.append(runner.pool.num_blocks * OPTIONS.block_size + 1)
    uses = np.random.default_rng(1).permutation(lending.lots.num_experts).reshape(len(subject.experts), -1)
    subject.cache.policy.seed(uses, 1)
    held = [set(np.flatnonzero(subject.cache.held(layer))) for layer in range(len(subject.experts))]
    sequence.append(runner.pool.num_blocks * OPTIONS.block_size)
    if not ON_GPU:  # where one lot holds all experts they have it to the end
        left = [uses[layer, each] for layer in range(len(uses)) for each in np.flatnonzero(subject.cache.held(layer))]
        before = sorted(uses[layer, each] for layer, experts in enumerate(held) for each in experts)
        assert 1 <= len(left) < len(before) and sorted(left) == before[-len(left) :]  # the most used ones stay
    assert ON_GPU or not lending.figures().staging  # prefill's buffers, which are idle, go before experts do
    lending.begin_streaming(1)
    assert lending.figures().staging and lending.num_slots == lending.lots.slots(lending.lots.least) >= 1
    assert subject.check_slots() == lending.num_slots
    lending.end_streaming()
    sequence.free()
    with pytest.raises(GenerationError, match="a sequence of 513 tokens: there is room for 512"):
        runner.prefill([(sequence, torch.zeros(513, dtype=torch.int64))])
    assert sequence.length == 0


class Allowed:
    """What activations were allowed to have beside their part; whoever holds more than that refuses less."""

    def __init__(self) -> None:
        self.calls, self.held = list[int](), 0

    def __call__(self, extra: int) -> bool:
        self.calls.append(extra)
        return extra >= self.held


def test_a_long_chunk_has_memory_of_experts() -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    lending, allowed = subject.lending, Allowed()
    lending.lots = replace(lending.lots, chunk=8, long_chunk=64, long=2)
    lending._allow = allowed
    lot, slots = lending.lots.lot_bytes, lending.num_slots
    for _ in range(2):  # as chunks of one prompt
        lending.begin_streaming(64)
        assert allowed.calls == [2 * lot] and lending.nbytes == (lending.lots.total - 2) * lot
        assert lending.figures().staging and subject.check_slots() == lending.num_slots
        assert lending.num_slots < slots or ON_GPU  # whose lots hold several times these experts
        lending.end_streaming()
    allowed.held = lot  # somebody still holds what was allocated meanwhile
    for _ in range(lending_module._STEPS):
        lending.after_step()
    assert lending.nbytes == (lending.lots.total - 2) * lot
    for count in (40, 64, 64):  # the allocator begins anew where what it has is of other sizes
        lending.begin_streaming(count)
        lending.end_streaming()
    assert allowed.calls == [2 * lot, 0, 2 * lot, 2 * lot]
    allowed.held = 0
    for _ in range(lending_module._STEPS):
        lending.after_step()
    assert allowed.calls[4:] == [0] and lending.nbytes == lending.lots.nbytes
    assert lending.figures().staging  # the next prompt may come soon
    for _ in range(lending_module._IDLE_LOOKS * lending_module._STEPS):
        lending.after_step()
    assert ON_GPU or not lending.figures().staging  # there experts have no use for its lots
    assert 1 <= subject.check_slots() <= lending.num_slots and lending.num_slots >= slots
    lending.begin_streaming(8)
    assert allowed.calls[-1] == 0  # short ones have memory of their own
    lending.end_streaming()


def test_room_for_a_long_chunk_is_made_before_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in the middle of what the last chunk's largest one had, if that chunk was of another length."""
    subject, order = Subject("qwen3_moe", first_blocks=2, slots=9), list[str]()
    lending, runner = subject.lending, subject.runner
    lending.lots = replace(lending.lots, chunk=9, long_chunk=64, long=2)
    lending._allow = lambda extra: order.append("room") is None
    embed, sequence = runner.decoder.embed, runner.new_sequence()
    monkeypatch.setattr(runner.decoder, "embed", lambda ids, out=None: order.append(str(len(ids))) or embed(ids, out))
    for count in (10, 10, 9, 10, 11):
        runner.start_prefill([(sequence, inputs(1, count)[0])]).abandon()
    assert order == ["room", "10", "10", "9", "room", "10", "room", "11"]

    def full(ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runner.decoder, "embed", full)
    with pytest.raises(GenerationError, match="the VRAM does not suffice for 10 tokens"):
        runner.start_prefill([(sequence, inputs(1, 10)[0])])
    assert not lending._streams and sequence.length == 0


@pytest.mark.skipif(ON_GPU, reason="the driver of a test refuses")
def test_memory_that_others_took_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    lending = subject.lending
    lending.lots = replace(lending.lots, chunk=8, long_chunk=64, long=3)
    lending.begin_streaming(64)
    lending.end_streaming()
    driver = lending._driver
    assert isinstance(driver, FakeMemory)
    driver.num_pieces = len(driver.pieces) + 1  # of three lots, one is left
    for _ in range(2 * lending_module._STEPS):
        lending.after_step()
    assert lending.nbytes == (lending.lots.total - 2) * lending.lots.lot_bytes
    assert "another program" in caplog.text and subject.check_slots() <= lending.num_slots


def test_memory_for_a_long_chunk_that_is_not_there() -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    lending, allowed = subject.lending, Allowed()
    lending.lots = replace(lending.lots, chunk=8, long_chunk=64, long=lending.lots.total)
    lending._allow = allowed
    with pytest.raises(KernelError, match="are missing"):
        lending.begin_streaming(64)
    assert not allowed.calls and not lending._streams


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.usefixtures("free_card")
def test_a_loaded_model_lends_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "_IDLE_LOOKS", 1)

    def planned(vram: int | None) -> Prepared:
        return prepare_synthetic("qwen3-30b-a3b", get_format("Q4_K"), 20, "hybrid", vram=vram, context=512)

    first = planned(None).plan.vram_budget(this_computer(True))
    vram = first.required + 6000 * 2**20  # for fewer, a long chunk's lots would be too large a part of all
    prepared = planned(vram)
    lots = prepared.plan.vram_budget(this_computer(True)).lots
    assert lots is not None and lots.first_slots < lots.num_experts
    runner = load(prepared, progress=False).runner
    lending, cache = runner.lending, runner.slots.cache
    ids = torch.randint(1000, (40,), generator=torch.Generator().manual_seed(0))

    def steps(count: int) -> torch.Tensor:
        sequence = runner.new_sequence()
        logits = [runner.prefill([(sequence, ids)]).cpu()]
        for _ in range(count):
            logits.append(runner.decode([sequence], [int(logits[-1].argmax())]).cpu())
        sequence.free()
        return torch.cat(logits)

    assert bool(steps(40).isfinite().all())
    before = lending.figures()
    assert lots.long_chunk == runner.options.max_chunk > 512  # whose activations take more than was set aside
    long = runner.new_sequence()
    chunk = torch.randint(1000, (lots.long_chunk,), generator=torch.Generator().manual_seed(1))
    assert bool(runner.prefill([(long, chunk)]).isfinite().all())
    assert lending.nbytes == lots.nbytes - lots.long * lots.lot_bytes
    long.free()
    time.sleep(lending_module._SECONDS)
    assert bool(steps(40).isfinite().all())
    assert lending.nbytes == lots.nbytes and lending.figures().num_slots == before.num_slots
    assert not before.staging and before.num_slots == lots.first_slots
    held = runner.new_sequence()
    held.append((runner.pool.num_blocks - 3) * runner.options.block_size)
    lent = lending.figures()
    assert lent.num_blocks >= runner.pool.num_blocks - 3 and lent.num_slots < before.num_slots
    assert bool(steps(40).isfinite().all())
    held.free()
    time.sleep(lending_module._SECONDS)
    assert bool(steps(60).isfinite().all())
    assert lending.figures().num_slots == before.num_slots
    assert lending.figures().num_blocks == before.num_blocks == runner.pool.num_backed
    ends = time.monotonic() + 60
    while cache.statistics().num_held < 0.9 * before.num_slots and time.monotonic() < ends:
        assert bool(steps(120).isfinite().all())  # slots that a prompt took are filled in about 80 steps
    cache.wait()
    tables = cache._tables.cpu().numpy()
    assert np.array_equal(tables, cache.policy.slot_of) and (tables >= 0).sum() >= 0.9 * before.num_slots
    long_bytes = lots.long * lots.lot_bytes  # which PyTorch's allocator had while they were not among the lots
    assert torch.cuda.max_memory_reserved() - long_bytes + lending.nbytes + DRIVER_BYTES <= vram


def test_what_is_dropped_gives_its_memory_back_at_once() -> None:
    """VRAM does not wait until Python looks for cycles."""
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    vars(subject.runner.server).pop("serve", None)  # which knows the subject
    lending, runner = subject.lending, subject.runner
    kept = [weakref.ref(each) for each in (lending, lending._stock, runner.steps, runner.pool, runner.slots.cache)]
    gc.collect()
    gc.disable()
    try:
        del subject, lending, runner
        assert [each() for each in kept] == [None] * len(kept)
    finally:
        gc.enable()


@pytest.mark.skipif(ON_GPU, reason="the driver of a test refuses")
def test_a_device_that_refuses_costs_the_request_only(caplog: pytest.LogCaptureFixture) -> None:
    subject = Subject("qwen3_moe", first_blocks=2, slots=9)
    driver, pool = subject.lending._driver, subject.runner.pool
    assert isinstance(driver, FakeMemory)
    held = pool.take(pool.num_backed)
    driver.refuse.add("map")
    with pytest.raises(GenerationError, match="cannot grow to"):
        pool.take(1)
    driver.refuse.clear()
    assert pool.num_free == pool.num_blocks - len(held)
    subject.check_slots()
    assert pool.take(1) == [len(held)]
    pool.give_back([*held, len(held)])
    subject.clock.now += 60
    driver.refuse.add("map")
    before = subject.lending.num_slots
    for _ in range(40):  # experts that were to have their memory again go on without it
        subject.lending.after_step()
    assert subject.lending.num_slots == before and caplog.text.count("fewer experts are cached") == 1
    driver.refuse.clear()
    for _ in range(40):
        subject.lending.after_step()
    assert subject.lending.num_slots > before
    subject.check_slots()
    with pytest.raises(KernelError, match="the plan says"):
        subject.lending.pool([KvShape(1, 8, 8)], 16, torch.float32)
