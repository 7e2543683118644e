"""Prompts on a GPU whose last layer is computed for those tokens only whose logits are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, OPTIONS, TOLERANCE, checkpoint_of, inputs, on_gpu
from tests.engine.test_streaming import FixedShares, with_staging

from moesaic.engine.gpu import prefill
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.timed_runs import GpuTimedRuns

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"] if ON_GPU else ["qwen3_moe"]


def expected(family: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint_of(family)[0](ids[None]).logits[0]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each layer whose routed experts the CPU computed."""
    tokens: list[int] = []
    real = prefill.moe_forward

    def noted(hidden: torch.Tensor, *others: Any, **options: Any) -> Any:
        tokens.append(len(hidden))
        return real(hidden, *others, **options)

    monkeypatch.setattr(prefill, "moe_forward", noted)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_only_wanted_tokens_go_through_the_last_layer(family: str, computed: list[int]) -> None:
    """A prompt in two pieces, of which the first is for its keys and values only; then a step of decode."""
    runner: ModelRunner = on_gpu(family, ON_GPU).runner
    ids, sequence = inputs(1, 9, seed=4)[0], runner.new_sequence()
    wanted = expected(family, ids)
    dense = len(runner.decoder.layers) - len(runner.decoder.routed)  # layers without routed experts, in front
    assert len(runner.prefill([(sequence, ids[:3])], "none")) == 0
    assert computed == [3] * (1 - dense)
    computed.clear()
    logits = runner.prefill([(sequence, ids[3:8])])
    assert relative_error(logits.cpu(), wanted[7:8]) < TOLERANCE
    assert computed == [5] * (1 - dense) + [1]
    logits = runner.decode([sequence], [int(ids[8])])
    assert relative_error(logits.cpu(), wanted[8:9]) < TOLERANCE


def test_sequences_of_a_chunk_have_a_token_each(computed: list[int]) -> None:
    """Also where one of them has no more than that, and where layers are called one by one."""
    runner = on_gpu("qwen3_moe").runner
    rows = [inputs(1, length, seed=length)[0] for length in (4, 1, 3)]
    parts = [(runner.new_sequence(), row) for row in rows]
    work = runner.start_prefill(parts)
    work.advance(1)
    work.advance(1)
    wanted = torch.cat([expected("qwen3_moe", row)[-1:] for row in rows])
    assert relative_error(work.logits().cpu(), wanted) < TOLERANCE
    assert computed == [8, 3]


def test_one_token_alone_is_a_chunk_like_all(computed: list[int]) -> None:
    runner = on_gpu("qwen3_moe").runner
    ids = inputs(1, 2, seed=6)[0]
    logits = runner.prefill([(runner.new_sequence(), ids[:1]), (runner.new_sequence(), ids[1:])])
    wanted = torch.cat([expected("qwen3_moe", row) for row in ids.split(1)])
    assert relative_error(logits.cpu(), wanted) < TOLERANCE
    assert computed == [2, 2]


def test_a_model_that_is_asked_for_its_last_logits(computed: list[int]) -> None:
    """`generate()` does: of all pieces but the last, the last layer gets nothing."""
    ours = on_gpu("qwen3_moe")
    ours.runner.options = replace(OPTIONS, max_chunk=4)
    ids = inputs(1, 6, seed=7)
    with torch.no_grad():
        logits = ours(ids, logits_to_keep=1).logits[0]
    assert relative_error(logits, expected("qwen3_moe", ids[0])[-1:]) < TOLERANCE
    assert computed == [4, 2, 1]


class NotedShares(FixedShares):
    """Notes what is observed."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__(chosen)
        self.observed = 0

    def observe_layer(self, seconds: float) -> None:
        self.observed += 1
        super().observe_layer(seconds)


def test_experts_do_not_set_out_for_a_layer_of_few_tokens(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts are the CPU's, the layer before is timed all the same, and the next chunk's begin ahead."""
    shares = NotedShares([*range(8)])
    runner = with_staging("qwen3_moe", shares, 4).runner
    filled: list[int] = []
    fill = runner.staging.fill
    monkeypatch.setattr(runner.staging, "fill", lambda layer, *others: filled.append(layer) or fill(layer, *others))
    ids, sequence = inputs(1, 18, seed=8)[0], runner.new_sequence()
    runner.prefill([(sequence, ids[:9])], "none")
    assert computed == [] and set(filled) == {0} and shares.observed == 0
    logits = runner.prefill([(sequence, ids[9:])])
    assert relative_error(logits.cpu(), expected("qwen3_moe", ids)[-1:]) < TOLERANCE
    assert computed == [1] and set(filled) == {0} and shares.observed == 1
    assert len(shares.seen) == 2 and shares.ahead[0] == 0 < shares.ahead[1]


def test_a_bench_tells_the_last_layer_from_the_others(computed: list[int]) -> None:
    """Or a model of few layers would be taken for a quicker one when it is extrapolated."""
    runner = on_gpu("qwen3_moe").runner
    bench = GpuTimedRuns(runner, "prefill", 6, 1)
    assert 0 < bench.layer_share() < 1 and computed == [6, 1]
    assert bench.short_layers == 1
    assert [GpuTimedRuns(runner, what, count, 4).short_layers for what, count in (("decode", 6), ("prefill", 1))] == [
        0,
        0,
    ]
    assert runner.pool.num_free == OPTIONS.num_blocks
