"""What may be drawn, and how often: against the processors of transformers and the probabilities themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moesaic.engine.serving.choice import Filters, choose, kept, largest, log_sum_exp


def constant(noise: float) -> Callable[[int], float]:
    return lambda index: noise


def probabilities(row: torch.Tensor, filters: Filters) -> np.ndarray:
    """What `kept` gives, as probabilities of all tokens."""
    ids, weights = kept(row.numpy(), filters)
    result = np.zeros(row.numel())
    result[slice(None) if ids is None else ids] = weights
    return result / result.sum()


def expected(row: torch.Tensor, filters: Filters) -> np.ndarray:
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(filters.temperature))])
    if filters.top_k:
        processors.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        processors.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p:
        processors.append(MinPLogitsWarper(filters.min_p))
    return processors(None, row[None].double())[0].softmax(-1).numpy()


@pytest.mark.parametrize("vocab_size", [2, 63, 130, 5000, 40000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(0.7),
        Filters(2.0, top_k=1),
        Filters(0.3, top_k=50),
        Filters(1.0, top_k=45000),
        Filters(0.7, top_p=0.95),
        Filters(1.0, top_p=0.5),
        Filters(1.0, top_p=0.0),
        Filters(1.5, top_p=0.9999),
        Filters(1.0, min_p=0.05),
        Filters(1.0, min_p=1.0),
        Filters(0.6, top_k=20, top_p=0.95),
        Filters(0.8, top_k=300, top_p=0.9, min_p=0.02),
        Filters(0.8, top_p=0.9, min_p=0.1),
        Filters(1.0, top_p=0.3, min_p=0.01),
        Filters(1.5, top_p=0.95, min_p=1e-6),
    ],
    ids=str,
)
def test_kept_as_in_transformers(vocab_size: int, spread: float, filters: Filters) -> None:
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    ours, theirs = probabilities(row, filters), expected(row, filters)
    np.testing.assert_allclose(ours, theirs, atol=3e-7, rtol=1e-4)
    # Only what is less likely than float32 can tell may be kept by one and not by the other.
    differing = (ours > 0) != (theirs > 0)
    assert theirs[differing].sum() + ours[differing].sum() < 2e-6


@pytest.mark.parametrize(
    "filters",
    [
        Filters(0.7, top_p=0.95),
        Filters(1.0, top_p=0.8),
        Filters(0.7, top_k=20, top_p=0.9),
        Filters(1.0, top_p=0.7, min_p=0.02),
        Filters(3.0, top_p=0.6, min_p=0.001),
        Filters(1.0, top_p=0.999, min_p=0.3),
    ],
)
def test_peaks_above_a_large_vocabulary(filters: Filters) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        row = torch.randn(150_000, generator=generator) * 2
        row[torch.randint(150_000, (8,), generator=generator)] += torch.rand(8, generator=generator) * 25
        np.testing.assert_allclose(probabilities(row, filters), expected(row, filters), atol=3e-7, rtol=1e-4)


def test_what_is_far_below_the_peak_can_decide() -> None:
    """The second token is kept only because 150,000 unlikely ones have 0.0007 of the first one's weight together."""
    row = torch.full((150_000,), -19.2)
    row[[5, 9]] = torch.tensor([0.0, math.log(0.0525263)])
    filters = Filters(top_p=0.95)
    assert np.flatnonzero(probabilities(row, filters)).tolist() == [5, 9]
    assert np.flatnonzero(expected(row, filters)).tolist() == [5, 9]
    assert {choose(row.numpy(), filters, constant(noise)) for noise in (0.1, 0.97)} == {5, 9}


def test_of_equal_tokens_the_first_are_kept() -> None:
    row = torch.zeros(1000)
    ids, weights = kept(row.numpy(), Filters(top_p=0.25))
    assert ids is not None
    assert ids.tolist() == list(range(250))
    assert len(weights) == 250
    ids, _ = kept(row.numpy(), Filters(top_k=10))
    assert ids is None or len(ids) == 1000  # transformers keeps those that are as likely as the last, too


def test_masked_tokens_are_never_drawn() -> None:
    row = np.full(150_000, -np.inf, np.float32)
    row[[7, 70_000, 149_999]] = [1.0, 2.0, 3.0]
    for filters in (Filters(), Filters(top_k=20), Filters(top_p=0.99), Filters(min_p=0.001), Filters(100.0)):
        drawn = {choose(row, filters, constant(noise)) for noise in np.linspace(0, 1 - 2**-53, 50)}
        assert drawn == {7, 70_000, 149_999}, filters


@pytest.mark.parametrize("vocab_size", [5, 3000, 50_000])
@pytest.mark.parametrize("filters", [Filters(), Filters(top_p=0.9), Filters(2.0, top_k=30)], ids=str)
def test_the_ends_of_noise(vocab_size: int, filters: Filters) -> None:
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).numpy()
    row[0] = row[-1] = -np.inf
    for noise in (0.0, 5e-324, 1 - 2**-53):
        assert np.isfinite(row[choose(row, filters, constant(noise))])


def test_noise_divides_the_interval_by_probability() -> None:
    """The share of evenly spaced noise that takes a token is its probability, up to the spacing."""
    row = torch.randn(20_000, generator=torch.Generator().manual_seed(5)) * 4
    steps = 20_000
    counts = np.bincount(
        [choose(row.numpy(), Filters(), constant((i + 0.5) / steps)) for i in range(steps)], minlength=20_000
    )
    np.testing.assert_allclose(counts / steps, row.double().softmax(-1).numpy(), atol=1.01 / steps + 1e-6)


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.95])
def test_draws_from_a_flat_nucleus(top_p: float) -> None:
    """Too flat for a first look, so that draws are repeated: kept tokens only, as often as their probability says."""
    row, filters = torch.randn(4000, generator=torch.Generator().manual_seed(8)), Filters(0.9, top_p=top_p)
    row[1000:3000] = row[500]  # a row of equal ones
    random, draws = Random(1), 4000
    counts = np.zeros(4000)
    for _ in range(draws):
        numbers = [random.random() for _ in range(64)]
        counts[choose(row.numpy(), filters, numbers.__getitem__)] += 1
    wanted = expected(row, Filters(0.9, top_p=1.0))
    order = np.argsort(-wanted, kind="stable")
    wanted[order[1:][np.cumsum(wanted[order])[:-1] >= top_p]] = 0
    wanted *= draws / wanted.sum()
    assert counts[wanted == 0].sum() == 0
    groups = [np.add.reduceat(x, np.arange(0, 4000, 100)) for x in (counts, wanted)]
    observed, wanted = [x[groups[1] > 0] for x in groups]
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    assert chi_square < len(wanted) + 3.72 * math.sqrt(2 * len(wanted)) + 10


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_log_sum_exp(spread: float) -> None:
    row = torch.randn(100_000, generator=torch.Generator().manual_seed(2)) * spread + 50
    assert math.isclose(log_sum_exp(row.numpy()), row.double().logsumexp(0).item(), abs_tol=2e-6)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=400), st.integers(1, 80))
def test_largest(values: list[float], count: int) -> None:
    row = np.array([*values, 3.0], np.float32)
    finite = np.sort(row[np.isfinite(row)])
    last = finite[-count] if count <= finite.size else finite[0]
    ids = largest(row, count)
    assert set(np.flatnonzero(row >= last)) <= set(ids.tolist())
    assert all(row[i] >= last or not np.isfinite(row[i]) for i in ids)
