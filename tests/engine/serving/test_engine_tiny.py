"""The engine over tiny models of unusual kinds: every answer is what stock transformers gives for its prompt alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.engine.pairs import checkpoint_of, load_tiny
from tests.tiny_models import tiny_inputs

from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.paged_runner import PagedRunner, paged_runner_for
from moesaic.engine.serving.params import SamplingParams

LENGTHS = [1, 33, 7, 90, 2, 18, 64]
FAMILIES = ["qwen3_next", "dots1"]
COUNT = 12


def runner_of(family: str, num_blocks: int, **options: Any) -> PagedRunner:
    runner = paged_runner_for(load_tiny(family), num_blocks, block_size=16, kv_dtype=torch.float32, **options)
    assert runner is not None
    return runner


def prompt(length: int) -> list[int]:
    ids: list[int] = tiny_inputs(1, length, seed=length)[0].tolist()
    return ids


@functools.cache
def alone(family: str, length: int, count: int = COUNT) -> list[int]:
    stock = checkpoint_of(family)[0]
    out = stock.generate(torch.tensor([prompt(length)]), max_new_tokens=count, do_sample=False)
    return out[0, length:].tolist()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_beside_answers(family: str) -> None:
    """Chunks of at most 20 tokens, so every long prompt is cut, each time beside others."""
    asked = Asked(Engine(runner_of(family, 80, max_chunk=20), None))
    for length in LENGTHS:
        asked.add(str(length), length, greedy())
        asked.step()
    asked.run()
    for length in LENGTHS:
        assert asked.answers[str(length)][0].token_ids == alone(family, length), length
    asked.check_nothing_is_held()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_cache_takes_turns(family: str) -> None:
    asked = Asked(Engine(runner_of(family, 9, max_chunk=24), None))
    for length in LENGTHS:
        asked.add(str(length), length, greedy(max_tokens=40))
    asked.run()
    assert asked.engine.stats().preemptions > 0
    for length in LENGTHS:
        assert asked.answers[str(length)][0].token_ids == alone(family, length, 40), length
    asked.check_nothing_is_held()


@pytest.mark.parametrize("family", FAMILIES)
def test_several_answers_to_a_prompt_and_some_that_nobody_wants_any_more(family: str) -> None:
    asked = Asked(Engine(runner_of(family, 80), None))
    asked.add("three", 33, greedy(n=3))
    asked.add("random", 18, greedy(n=2, temperature=1.0, seed=5))
    asked.add("cancelled", 90, greedy(max_tokens=100))
    for _ in range(6):
        asked.step()
    asked.engine.cancel("cancelled")
    asked.add("late", 7, greedy())
    asked.run()
    assert [each.token_ids for each in asked.answers["three"]] == [alone(family, 33)] * 3
    assert asked.answers["late"][0].token_ids == alone(family, 7)
    first, second = (each.token_ids for each in asked.answers["random"])
    assert first != second
    again = Asked(Engine(runner_of(family, 80), None))
    again.add("random", 18, greedy(n=2, temperature=1.0, seed=5))
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
