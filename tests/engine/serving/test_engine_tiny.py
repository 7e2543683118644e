"""The engine over tiny models of unusual kinds: every answer is what stock transformers gives for its prompt alone."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import save_tiny, tiny_inputs
from transformers import PreTrainedModel

from moesaic.engine.loader import load, prepare
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.paged_runner import PagedRunner, paged_runner_for
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.start import ServingOptions, engine_of
from moesaic.errors import ConfigError

LENGTHS = [1, 33, 90, 7, 50]
COUNT, MOST = 12, 24
DYNAMIC = {
    "max_position_embeddings": 48,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 48,
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [2.0 + i / 4 for i in range(32)],
    }
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {}),
    "dots1": ("dots1", {}),
    "dynamic": ("qwen3_moe", DYNAMIC),
    "dynamic MLA": ("deepseek_v3", DYNAMIC),
    "dynamic in parts": ("qwen3_next", DYNAMIC),
    "longrope": ("qwen3_moe", LONGROPE),
}


@functools.cache
def models(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The stock model and ours."""
    family, overrides = copy.deepcopy(KINDS[kind])  # configurations write into it
    folder = Path(tempfile.mkdtemp(prefix="moesaic-"))
    stock = save_tiny(folder, family, **overrides)
    stock.generation_config.eos_token_id, stock.generation_config.pad_token_id = None, 0
    return stock, load(prepare(str(folder)), progress=False)


def runner_of(kind: str, num_blocks: int, **options: Any) -> PagedRunner:
    runner = paged_runner_for(models(kind)[1], num_blocks, block_size=16, kv_dtype=torch.float32, **options)
    assert runner is not None
    return runner


def prompt(length: int) -> list[int]:
    ids: list[int] = tiny_inputs(1, length, seed=length)[0].tolist()
    return ids


@functools.cache
def stock_answer(kind: str, ids: tuple[int, ...]) -> list[int]:
    stock = models(kind)[0]
    stock(torch.ones(1, 1, dtype=torch.int64))  # its frequencies may still be those of a longer text
    out = stock.generate(torch.tensor([ids]), max_new_tokens=MOST, do_sample=False)
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def alone(kind: str, length: int, count: int = COUNT) -> list[int]:
    return stock_answer(kind, tuple(prompt(length)))[:count]


def greedy(**others: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": COUNT, "temperature": 0.0} | others))


class Asked:
    """Requests and their answers so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[str, list[Completion]] = {}

    def add(self, name: str, length: int, params: SamplingParams) -> None:
        self.answers[name] = [Completion(index) for index in range(params.n)]
        self.engine.add(name, prompt(length), params)

    def step(self) -> None:
        for name, chunk in self.engine.step():
            self.answers[name][chunk.index].add(chunk)

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def check_nothing_is_held(self) -> None:
        runner, stats = self.engine.runner, self.engine.stats()
        assert stats.blocks_free + stats.blocks_cached == stats.blocks
        assert runner.states is None or runner.states.num_free == runner.states.num_slots


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_pieces_beside_answers(kind: str) -> None:
    """Chunks of at most 20 tokens, so every long prompt is cut, each time beside others."""
    asked = Asked(Engine(runner_of(kind, 80, max_chunk=20), None))
    for length in LENGTHS:
        asked.add(str(length), length, greedy())
        asked.step()
    asked.run()
    for length in LENGTHS:
        assert asked.answers[str(length)][0].token_ids == alone(kind, length), length
    asked.check_nothing_is_held()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_cache_takes_turns(kind: str) -> None:
    """Three prompts fill it, and each answer needs two blocks more."""
    asked, lengths = Asked(Engine(runner_of(kind, 8, max_chunk=24), None)), (47, 31, 46, 14)
    for length in lengths:
        asked.add(str(length), length, greedy(max_tokens=MOST))
    asked.run()
    assert asked.engine.stats().preemptions > 0
    for length in lengths:
        assert asked.answers[str(length)][0].token_ids == alone(kind, length, MOST), length
    asked.check_nothing_is_held()


@pytest.mark.parametrize("kind", KINDS)
def test_several_answers_to_a_prompt_and_some_that_nobody_wants_any_more(kind: str) -> None:
    asked = Asked(Engine(runner_of(kind, 80), None))
    asked.add("three", 33, greedy(n=3))
    asked.add("random", 50, greedy(n=2, temperature=1.0, seed=5))
    asked.add("cancelled", 90, greedy(max_tokens=100))
    for _ in range(6):
        asked.step()
    asked.engine.cancel("cancelled")
    asked.add("late", 7, greedy())
    asked.run()
    assert [each.token_ids for each in asked.answers["three"]] == [alone(kind, 33)] * 3
    assert asked.answers["late"][0].token_ids == alone(kind, 7)
    first, second = (each.token_ids for each in asked.answers["random"])
    assert first != second
    again = Asked(Engine(runner_of(kind, 80), None))
    again.add("random", 50, greedy(n=2, temperature=1.0, seed=5))
    again.run()
    assert [each.token_ids for each in again.answers["random"]] == [first, second]
    asked.check_nothing_is_held()


def test_few_states_make_others_wait() -> None:
    asked = Asked(Engine(runner_of("qwen3_next", 80, num_states=2), None))
    for length in LENGTHS:
        asked.add(str(length), length, greedy())
    most = 0
    while asked.engine.has_work:
        asked.step()
        most = max(most, asked.engine.stats().running)
    assert most == 2
    for length in LENGTHS:
        assert asked.answers[str(length)][0].token_ids == alone("qwen3_next", length), length


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "dynamic in parts"])
def test_a_prefix_is_shared_only_where_its_keys_are_the_same(kind: str) -> None:
    """Angles of a prompt of more than 48 tokens are its own; those of others are the same up to there."""
    shares = runner_of(kind, 40).shares_prefixes
    long, text = prompt(90), prompt(41)
    for before, then, cached in (
        (text, [*text, 5], 32),
        ([*text, *range(3, 9)], [*text, 9], 32),
        ([*text, *range(3, 12)], [*text, 9], 0),  # 50 tokens
        (text, [*text, *range(3, 12)], 0),
        (long, [*long[:40], 5], 0),
        (long, [*long, 5], 0),
    ):
        asked = Asked(Engine(runner_of(kind, 40), None))
        for name, ids in (("before", before), ("then", then)):
            asked.answers[name] = [Completion(0)]
            asked.engine.add(name, ids, greedy())
            asked.run()
        assert asked.answers["then"][0].stats.cached_tokens == (cached if shares else 0), (len(before), len(then))
        assert asked.answers["then"][0].token_ids == stock_answer(kind, tuple(then))[:COUNT]


def test_an_engine_for_a_model_with_states_says_how_many_there_are(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(tempfile.mkdtemp(prefix="moesaic-"))
    save_tiny(folder, "qwen3_next")
    prepared = prepare(str(folder))
    model = load(prepared, progress=False)
    state = prepared.plan.state_bytes_on("cpu")
    for kv_cache, slots in ((8 * state, 4), (100 * state, 8), (None, 8)):
        caplog.clear()
        engine = engine_of(model, prepared, None, ServingOptions(context=128, kv_cache=kv_cache, max_batch=8))
        assert isinstance(engine.runner, PagedRunner)
        assert engine.runner.states is not None and engine.runner.states.num_slots == slots
        assert (f"room for {slots} recurrent states" in caplog.text) == (slots < 8)
        asked = Asked(engine)
        asked.add("33", 33, greedy())
        asked.run()
        assert len(asked.answers["33"][0].token_ids) == COUNT
        engine.close()
    with pytest.raises(ConfigError, match="recurrent state"):
        engine_of(model, prepared, None, ServingOptions(kv_cache=state, max_batch=8))
