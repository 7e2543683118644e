"""The bound of decode against numbers that were calculated by hand, and random choices that were counted."""

from __future__ import annotations

import random

import pytest

from moesaic.engine.serving.bench.bound import ExpertBytes, StepBytes, bound_of, expected_distinct

LAYER = ExpertBytes(num_experts=4, top_k=1, expert_bytes=100)


def test_one_user_has_as_many_experts_as_a_token_chooses() -> None:
    assert expected_distinct(128, 8, 1) == pytest.approx(8)
    assert expected_distinct(4, 1, 2) == pytest.approx(4 * (1 - 9 / 16))
    assert expected_distinct(8, 2, 1000) == pytest.approx(8)


def test_random_choices_are_counted() -> None:
    rng = random.Random(0)
    counts = [len({expert for _ in range(8) for expert in rng.sample(range(128), 8)}) for _ in range(4000)]
    assert expected_distinct(128, 8, 8) == pytest.approx(sum(counts) / len(counts), rel=0.01)


def test_bytes_of_a_step() -> None:
    step = StepBytes(shared=1000, layers=(LAYER, LAYER), cache=10)
    assert step.of(1) == pytest.approx(1000 + 2 * 100 + 10)
    assert step.of(2) == pytest.approx(1000 + 2 * 175 + 20)
    assert step.of(2, [1, 2]) == pytest.approx(1000 + 300 + 20)


def test_a_bound_by_hand() -> None:
    step = StepBytes(shared=300, layers=(LAYER,))  # 400 bytes of one user, 500 of eight with two experts
    bound = bound_of(8, 48.0, 10.0, step, [2.0])
    assert (bound.step_bytes, bound.gain) == (500, pytest.approx(8 * 400 / 500))
    assert bound.tokens_per_second == pytest.approx(64)
    assert bound.share == pytest.approx(0.75)
    assert (bound.users, bound.distinct, bound.measured) == (8, 2.0, 48.0)
    assert bound.expected_distinct == pytest.approx(4 * (1 - 0.75**8))


def test_without_measured_experts_those_of_random_routing_count() -> None:
    bound = bound_of(2, 1.0, 1.0, StepBytes(300, (LAYER,)))
    assert bound.distinct is None
    assert bound.step_bytes == pytest.approx(300 + 175)


def test_the_bound_of_qwen3_30b() -> None:
    """12 layers in Q4_K, which has 4.5 bits a weight; contexts of 512 tokens: about 2.2 and 4.3 times one user."""
    expert = 3 * 768 * 2048 * 4.5 / 8
    attention = (2 * 4096 * 2048 + 2 * 512 * 2048) * 4.5 / 8
    router, head, cache = 128 * 2048 * 4, 151936 * 2048 * 4.5 / 8, 12 * 512 * 2 * 4 * 128 * 2
    step = StepBytes(12 * (attention + router) + head, 12 * (ExpertBytes(128, 8, expert),), cache)
    assert bound_of(8, 1.0, 1.0, step).gain == pytest.approx(2.2, abs=0.1)
    assert bound_of(32, 1.0, 1.0, step).gain == pytest.approx(4.3, abs=0.1)
