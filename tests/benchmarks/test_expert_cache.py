"""Replays of routing with known outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest

import expert_cache
from expert_cache import Trace
from routing import chosen_shares, zipf_log_probabilities, zipf_trace


def alternating(first: int, second: int, tokens: int = 400) -> Trace:
    """One layer of 8 experts, one per token, two of them in turns."""
    choices = np.where(np.arange(tokens) % 2, second, first)[:, None, None]
    return Trace("alternating", choices, 8)


def test_two_experts_fit_in_two_slots() -> None:
    trace = alternating(2, 5)
    for outcome in (
        expert_cache.replay_policy(trace, 2, share=1.0),
        expert_cache.replay_lru(trace, 2),
        expert_cache.replay_static(trace, 2),
        expert_cache.replay_bound(trace, 2),
    ):
        assert (outcome.hits, outcome.copies) == (1.0, 0.0)


def test_lru_hits_nothing_where_two_take_turns_in_one_slot_and_the_policy_keeps_one() -> None:
    trace = alternating(2, 5)
    lru, policy = expert_cache.replay_lru(trace, 1), expert_cache.replay_policy(trace, 1, share=1.0)
    assert (lru.hits, lru.copies, lru.saved) == (0.0, 1.0, -1.0)
    assert (policy.hits, policy.copies) == (0.5, 0.0)


def test_what_was_busy_at_first_may_not_be_later() -> None:
    choices = np.repeat([1, 6], [100, 300])[:, None, None]
    trace = Trace("change", choices, 8)
    assert expert_cache.replay_static(trace, 1).hits == 0.0
    assert expert_cache.replay_bound(trace, 1).hits >= 1 - 156 / 300
    assert expert_cache.replay_policy(trace, 1, share=1.0).hits > 0.5


def test_experts_of_layers_are_told_apart() -> None:
    trace = Trace("two layers", np.array([[[1, 2], [1, 3]]]), 8)
    assert trace.flat().tolist() == [[1, 2, 9, 11]]
    assert trace.per_token == 4 and trace.slots(0.25) == 4


def test_a_copy_is_not_there_before_its_time() -> None:
    """Decided after the eighth token, copied during the ninth, there for the tenth."""
    trace = Trace("one expert", np.full((20, 1, 1), 3), 8)
    outcome = expert_cache.replay_policy(trace, 1, share=1.0)
    assert outcome.hits == pytest.approx((20 - 9) / 15)  # the first five tokens do not count
    assert outcome.copies == pytest.approx(1 / 15)


@pytest.mark.parametrize("exponent", [0.6, 1.2])
def test_zipf_routers_choose_as_often_as_they_should(exponent: float) -> None:
    weights = np.exp(zipf_log_probabilities(2, 16, exponent, seed=3))
    assert weights.sum(axis=1) == pytest.approx(1.0)
    ordered = np.sort(weights[1])[::-1]
    assert ordered[0] / ordered[7] == pytest.approx(8**exponent)
    assert not np.array_equal(np.argsort(weights[0]), np.argsort(weights[1]))
    choices = zipf_trace(512, 2, 16, 1, exponent, seed=3)  # before the ranking drifts
    for layer in range(2):
        found = np.bincount(choices[:, layer, 0], minlength=16) / 512
        for expert, expected in enumerate(weights[layer]):
            assert abs(found[expert] - expected) < 4 * math.sqrt(expected / 512) + 1e-9


def test_zipf_routers_choose_different_experts_and_drift() -> None:
    choices = zipf_trace(2048, 1, 32, 4, 1.0)
    assert all(len(set(token[0].tolist())) == 4 for token in choices)
    first, last = (np.bincount(part.ravel(), minlength=32) for part in (choices[:512], choices[-512:]))
    assert np.abs(first - last).max() > 40


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_chosen_shares_are_those_of_draws(exponent: float) -> None:
    """40,000 draws of 5 of 24; and of one, where the share is the probability itself."""
    scores = zipf_log_probabilities(2, 24, exponent, seed=1)
    shares = chosen_shares(scores, 5)
    assert shares.sum(axis=1) == pytest.approx(5.0, abs=1e-6)
    noisy = scores + np.random.default_rng(2).gumbel(size=(40_000, 2, 24))
    chosen = np.argpartition(-noisy, 4, axis=-1)[..., :5]
    for layer in range(2):
        found = np.bincount(chosen[:, layer].ravel(), minlength=24) / 40_000
        assert np.abs(found - shares[layer]).max() < 4 * math.sqrt(0.25 / 40_000)
    assert chosen_shares(scores, 1) == pytest.approx(np.exp(scores), abs=1e-7)
