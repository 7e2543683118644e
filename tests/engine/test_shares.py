"""Which experts of a chunk are streamed to the GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesaic.engine.gpu.shares import Costs, ExpertShares


def finish(costs: Costs, tokens: np.ndarray, on_gpu: np.ndarray) -> float:
    """When both are done."""
    kept = tokens * ~on_gpu
    cpu = max(costs.per_read * np.count_nonzero(kept), costs.per_token * float(kept.sum()))
    return max(costs.per_upload * int(on_gpu.sum()), cpu)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_number_of_experts_ends_earlier(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.poisson(random.uniform(20, 300, 64))
    costs = Costs(per_upload=1.0, per_read=0.4, per_token=random.uniform(0.01, 0.1))
    chosen = ExpertShares(replace(costs)).choose(0, tokens)
    order = np.argsort(-tokens, kind="stable")
    best = min(finish(costs, tokens, np.isin(np.arange(64), order[:n])) for n in range(65))
    assert finish(costs, tokens, chosen) == pytest.approx(best)
    assert tokens[chosen].min() >= tokens[~chosen].max()


def test_short_prompts_stay_on_the_cpu() -> None:
    """Reading bounds the CPU: uploads would read the same memory."""
    assert not ExpertShares(Costs(1.0, 0.5, 0.01)).choose(0, np.full(64, 8)).any()


def test_experts_that_nobody_chose_are_not_copied() -> None:
    tokens = np.zeros(8, np.int64)
    tokens[3] = 10_000
    assert np.flatnonzero(ExpertShares(Costs(1.0, 0.5, 0.01)).choose(0, tokens)).tolist() == [3]


def test_a_slow_link_gets_less() -> None:
    tokens = np.full(64, 1000)
    shares = ExpertShares(Costs(1.0, 0.5, 0.01))
    before = int(shares.choose(0, tokens).sum())
    for _ in range(30):
        shares.observe_uploads(10, seconds=200.0)
    assert 0 < int(shares.choose(0, tokens).sum()) < before / 2


def test_a_slow_cpu_gets_less() -> None:
    tokens = np.full(64, 1000)
    shares = ExpertShares(Costs(1.0, 0.5, 0.001))
    before = int(shares.choose(0, tokens).sum())
    for _ in range(30):
        shares.observe_cpu(32, 32_000, seconds=3200.0)
    shares.observe_cpu(32, 4000, seconds=10.0)  # bound by reading: says nothing about tokens
    shares.observe_cpu(1, 8, seconds=10.0)  # nor does starting to compute
    assert shares.costs.per_token == pytest.approx(0.1, rel=0.01)
    assert int(shares.choose(0, tokens).sum()) > 1.5 * before


def test_a_layer_that_waited_for_a_compiler_is_forgotten() -> None:
    tokens = np.full(64, 1000)
    shares = ExpertShares(Costs(1.0, 0.5, 0.01))
    before = int(shares.choose(0, tokens).sum())
    shares.observe_uploads(10, seconds=1e6)
    assert int(shares.choose(0, tokens).sum()) > before / 2
    shares.costs.per_upload = 1e6  # however it came to that
    for _ in range(600):
        shares.choose(0, tokens)
    assert shares.choose(0, tokens).any()


def test_a_cpu_that_was_slow_once_gets_another_chance() -> None:
    tokens = np.full(64, 1000)
    shares = ExpertShares(Costs(1.0, 0.5, 1e6))
    assert shares.choose(0, tokens).all()
    for _ in range(600):
        shares.choose(0, tokens)
    assert not shares.choose(0, tokens).all()
