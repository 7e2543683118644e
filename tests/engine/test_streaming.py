"""Experts that are streamed to a GPU in prefill: the same logits whoever computes them, and copies that are few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.pairs import relative_error
from tests.engine.test_gpu import DEVICE, OPTIONS, TOLERANCE, checkpoint_of, eager_cache, inputs, load_small
from tests.kernels.oracle import packed

from moesaic.engine.gpu import prefill
from moesaic.engine.gpu import staging as staging_module
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.measured_costs import cpu_costs, measure_costs
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.shares import Costs, ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers, runs_of
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.decoder import GpuDecoder


class FixedShares(ExpertShares):
    """The GPU gets these experts, if a token chose them, and those that are there already."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__(Costs(1.0, 1.0, 0.0, 1.0, 1.0))
        self.mine = chosen
        self.ahead: list[int] = []
        self.seen: list[np.ndarray] = []

    def choose(self, layer, tokens, num_rows, present=None, under_way=0):
        assert present is not None
        super().choose(layer, tokens, num_rows)
        self.seen.append(tokens)
        self.ahead.append(int(present.sum()))
        return (np.isin(np.arange(len(tokens)), self.mine) | present) & (tokens > 0)


def with_staging(family: str, shares: ExpertShares, num_slots: int, slots=lambda decoder: ExpertSlots()):
    model = load_small(family)
    decoder = GpuDecoder(model, DEVICE, max_positions=512, dtype=torch.float32)
    experts = [each for each in decoder.routed if each is not None]
    staging = StagingBuffers(experts, num_slots, DEVICE)
    return attach_runner(model, ModelRunner(decoder, replace(OPTIONS, graphs=False), slots(decoder), staging, shares))


@pytest.mark.parametrize(
    ("family", "chosen", "num_slots"),
    [("qwen3_moe", [*range(8)], 4), ("gpt_oss", [0, 2], 4), ("deepseek_v3", [], 8), ("qwen3_moe", [1, 5], 2)],
)
def test_whoever_computes_experts_the_logits_are_the_same(family: str, chosen: list[int], num_slots: int) -> None:
    shares = FixedShares(chosen)
    ours = with_staging(family, shares, num_slots)
    ids = inputs(batch=1, length=9, seed=1)
    cache = ours.new_cache()
    with torch.no_grad():
        expected = checkpoint_of(family)[0](ids).logits
        assert relative_error(ours(ids, past_key_values=cache).logits, expected) < TOLERANCE
    if len(chosen) == 8:
        assert max(shares.ahead) > 0  # some set out before their layer was known


def test_experts_in_the_cache_are_not_streamed() -> None:
    shares = FixedShares([0, 1, 2, 4, 6])
    ours = with_staging("qwen3_moe", shares, 4, eager_cache)
    cache = ours.runner.slots.cache
    uses = np.zeros((2, 8), np.uint32)
    uses[0, 2:4], uses[1, :3] = 5, 7
    cache.after_step([0, 1], uses, 1)
    cache.before_step()
    cache.during_step()
    cache.wait()
    assert (cache.policy.slot_of >= 0).tolist() == (uses > 0).tolist()
    ids = inputs(batch=1, length=9, seed=2)
    with torch.no_grad():
        logits, expected = ours(ids).logits, checkpoint_of("qwen3_moe")[0](ids).logits
    assert relative_error(logits, expected) < TOLERANCE
    assert not any(shares.seen[layer][uses[layer] > 0].any() for layer in range(2))


def test_a_cache_with_room_for_all_leaves_the_cpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(decoder: GpuDecoder) -> ExpertSlots:
        cache = ExpertCache([each for each in decoder.routed if each is not None], 17, DEVICE)
        cache.fill()
        assert cache.statistics().num_held == 16
        return ExpertSlots(cache=cache)

    ours = with_staging("qwen3_moe", FixedShares([]), 4, filled)
    monkeypatch.setattr(prefill, "moe_forward", lambda *_, **__: pytest.fail("asked the CPU"))
    ids = inputs(batch=1, length=9, seed=2)
    with torch.no_grad():
        logits, expected = ours(ids).logits, checkpoint_of("qwen3_moe")[0](ids).logits
    assert relative_error(logits, expected) < TOLERANCE
    cache = ours.runner.slots.cache
    cache.restart(PromotionPolicy(2, 8, 3))
    assert cache.statistics().num_held == 0 and (cache.table(1) == -1).all()


def test_neighbours_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GpuDecoder(load_small("qwen3_moe"), DEVICE, max_positions=64, dtype=torch.float32)
    experts = [each for each in decoder.routed if each is not None]
    staging = StagingBuffers(experts, 8, DEVICE)
    copied: list[tuple[int, int, int]] = []
    real = staging_module.copy_experts

    def noted(source, first, count, layout, arena, slot):
        copied.append((first, count, slot))
        real(source, first, count, layout, arena, slot)

    monkeypatch.setattr(staging_module, "copy_experts", noted)
    groups = staging.plan(np.array([0, 1, 2, 4, 7]), max_gap=1)
    assert [group.experts.tolist() for group in groups] == [[0, 1], [2], [4, 7]]
    assert [group.slots.tolist() for group in groups] == [[0, 1], [0], [0, 1]]
    for group in groups:
        staging.fill(1, group)
        staging.use(group)  # what follows here waits for the copies
    assert copied == [(0, 2, 0), (2, 2, 0), (4, 1, 0), (7, 1, 1)]
    kernel, up = staging.layouts[1].kernel, experts[1].up
    for expert, place, slot in ((1, 0, 1), (4, 2, 0), (7, 2, 1)):
        begin = kernel.up.offset + slot * kernel.up.stride
        found = staging.arenas[place][begin : begin + up.matrix_bytes].cpu()
        assert torch.equal(found, up.data[expert * up.matrix_bytes : (expert + 1) * up.matrix_bytes])
    assert [group.place for group in staging.plan(np.array([3]), 0)] == [3]  # the next in the ring


def test_layers_with_other_formats_do_not_overwrite_each_other() -> None:
    def experts(first: str, down: str) -> PackedExperts:
        shapes = ((first, 64, 32), (first, 64, 32), (down, 32, 64))
        return PackedExperts(*(packed(fmt, rows, cols, 8, seed)[0] for seed, (fmt, rows, cols) in enumerate(shapes)))

    layers = [experts("Q8_0", "F32"), experts("F32", "Q8_0")]
    staging = StagingBuffers(layers, 8, DEVICE)
    (one,) = staging.plan(np.array([2, 3]), 0)
    staging.fill(0, one)
    staging.use(one)
    before = staging.arenas[one.place].clone()
    for group in staging.plan(np.arange(6), 0):
        assert group.place != one.place
        staging.fill(1, group)
        staging.use(group)
    assert torch.equal(before, staging.arenas[one.place])
    for layout in staging.layouts:
        assert layout.kernel.arena_bytes(staging.group) <= len(staging.arenas[0])


def test_runs_end_at_large_gaps() -> None:
    assert runs_of(np.array([], np.int64), 3) == []
    assert runs_of(np.array([0, 1, 3, 6, 7]), 0) == [(0, 2), (3, 1), (6, 2)]
    assert runs_of(np.array([0, 1, 3, 6, 7]), 1) == [(0, 4), (6, 2)]
    assert runs_of(np.array([5]), 2) == [(5, 1)]


def test_costs_are_measured() -> None:
    decoder = GpuDecoder(load_small("qwen3_moe"), DEVICE, max_positions=64, dtype=torch.float32)
    experts = [each for each in decoder.routed if each is not None]
    costs = measure_costs(experts[0], StagingBuffers(experts, 8, DEVICE))
    assert 0 < costs.per_upload < 1 and 0 < costs.fixed < 1
    assert costs.per_row == pytest.approx(costs.per_upload * 32 * 4 / (3 * 32 * 16 * 4))


def test_costs_follow_from_three_sizes() -> None:
    decoder = GpuDecoder(load_small("qwen3_moe"), DEVICE, max_positions=64, dtype=torch.float32)
    (experts, *_) = (each for each in decoder.routed if each is not None)
    found = cpu_costs(experts, lambda count, tokens: 5.0 + count * (2.0 + 0.5 * tokens))
    assert found == pytest.approx((5.0, 2.0, 0.5))
    assert all(cost > 0 for cost in cpu_costs(experts, lambda count, tokens: 1.0 / (count * tokens)))
