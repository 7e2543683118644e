"""Tokens of a step: determinism, distribution, defaults, log-probabilities, hostile logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from moesaic.engine.serving.choice import Filters
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler, sample
from moesaic.errors import GenerationError, LogitsError, RequestError

VOCAB = 500


def sampler(seed: int | None = 0, defaults: dict[str, Any] | None = None, **params: Any) -> RequestSampler:
    return RequestSampler(SamplingParams(**params), defaults or {}, VOCAB, [], seed, token_bytes=lambda i: b"<%d>" % i)


def logits(rows: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    rows = logits(3)
    rows[1, [40, 7, 300]] = 20.0
    ours = [sampler(temperature=0) for _ in range(3)]
    tokens, logprobs = sample(rows, ours)
    assert tokens == [rows[0].argmax(), 7, rows[2].argmax()]
    assert logprobs == [None] * 3
    assert [s.seed for s in ours] == [None] * 3


KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 0},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.0},
    {"temperature": 0.9, "repetition_penalty": 1.2, "logit_bias": {3: 5.0}},
]


def answer(which: list[int], steps: int = 12) -> dict[int, list[int]]:
    """Tokens of some of the requests, served together; logits depend on request and position only."""
    samplers = {i: sampler(seed=100 + i, **KINDS[i % len(KINDS)]) for i in which}
    tokens: dict[int, list[int]] = {i: [] for i in which}
    for step in range(steps):
        rows = torch.cat([logits(1, seed=1000 * i + step) for i in which])
        for i, token in zip(which, sample(rows, list(samplers.values()))[0], strict=True):
            samplers[i].accept(token)
            tokens[i].append(token)
    return tokens


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(9)), st.integers(1, 9))
def test_who_else_is_in_the_batch_does_not_matter(order: list[int], count: int) -> None:
    alone = {i: answer([i])[i] for i in order[:count]}
    assert answer(order[:count]) == alone


def test_a_call_changes_nothing() -> None:
    rows, ours = logits(4), [sampler(seed=i, temperature=1.0, repetition_penalty=1.5) for i in range(4)]
    before = rows.clone()
    assert sample(rows, ours) == sample(rows, ours)
    assert torch.equal(rows, before)


def test_seeds_and_positions_give_different_noise() -> None:
    noise = []
    for seed in (0, 1, 2, -1, 10**30):
        ours = sampler(seed=seed, temperature=1.0)
        assert ours.seed == seed
        for _ in range(200):
            noise.append(ours.noise())
            ours.accept(0)
    assert len(set(noise)) == len(noise)
    assert min(noise) >= 0 and max(noise) < 1
    assert abs(np.mean(noise) - 0.5) < 0.05
    assert sampler(seed=None, temperature=1.0).seed is not None


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_frequencies_are_probabilities(filters: dict[str, Any]) -> None:
    """Chi-square over tokens that are expected at least 10 times; the bound is exceeded once in 10,000 such tests."""
    rows, ours = logits(1, seed=9, spread=2.0), sampler(seed=4, temperature=0.8, **filters)
    draws = 6000
    counts = np.zeros(VOCAB)
    for _ in range(draws):
        [token], _ = sample(rows, [ours])
        counts[token] += 1
        ours.accept(token)
    wanted = _probabilities(rows[0] / 0.8, **filters) * draws
    assert counts[wanted == 0].sum() == 0
    often = wanted >= 10
    observed, wanted = [np.append(x[often], x[~often].sum()) for x in (counts, wanted)]
    used = wanted > 0
    degrees = int(used.sum()) - 1
    chi_square = float(((observed[used] - wanted[used]) ** 2 / wanted[used]).sum())
    assert chi_square < degrees + 3.72 * math.sqrt(2 * degrees) + 10


def _probabilities(scores: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """By definition, with a sort."""
    p = scores.double().softmax(-1).numpy()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    p[order[1:][np.cumsum(p[order])[:-1] >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("defaults", "params", "filters"),
    [
        ({}, {}, Filters(0.7, 0, 0.95)),
        ({"do_sample": False}, {}, None),
        ({"temperature": 0.6}, {}, None),  # transformers does not sample either
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, {}, Filters(0.6, 20, 0.9)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0}, None),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"top_k": 0}, Filters(0.6)),
        ({"do_sample": False, "min_p": 0.1}, {"temperature": 0.5}, Filters(0.5, min_p=0.1)),
        ({"do_sample": False}, {"top_p": 0.5}, Filters(1.0, top_p=0.5)),
        ({}, {"temperature": 1e-9}, None),
        ({"top_k": None}, {"temperature": 1.0}, Filters()),
    ],
)
def test_who_decides(defaults: dict[str, Any], params: dict[str, Any], filters: Filters | None) -> None:
    assert sampler(defaults=defaults, **params).filters == filters


@pytest.mark.parametrize("defaults", [{"top_p": 7}, {"temperature": "hot"}, {"repetition_penalty": float("nan")}])
def test_a_models_file_may_be_wrong(defaults: dict[str, Any]) -> None:
    [name] = defaults
    with pytest.raises(GenerationError, match=f"generation_config has {name} = "):
        sampler(defaults=defaults)
    sampler(defaults=defaults, **{name: 1.0})


def test_repetition_penalty_as_in_transformers() -> None:
    rows, prompt, told = logits(1), [3, 3, 8, 499], [10, 3, 10, 77]
    ours = RequestSampler(SamplingParams(repetition_penalty=1.3), {}, VOCAB, prompt, 0)
    for token in told:
        ours.accept(token)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + told]), rows)
    np.testing.assert_allclose(ours.adjusted(rows[0].numpy()), theirs[0].numpy(), rtol=1e-6)


def test_presence_frequency_and_bias() -> None:
    row = logits(1)[0].numpy()
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={10: -100.0, 4: 2.0})
    ours = RequestSampler(params, {}, VOCAB, [1, 2, 3], 0)
    for token in [10, 3, 10, 200, *range(300, 400), *range(300, 350)]:
        ours.accept(token)
    wanted = row.copy()
    wanted[[3, 200, *range(350, 400)]] -= 0.75
    wanted[[10, *range(300, 350)]] -= 1.0
    wanted[10] -= 100
    wanted[4] += 2
    np.testing.assert_allclose(ours.adjusted(row), wanted, rtol=1e-5, atol=1e-6)


def test_unused_penalties_cost_no_copy() -> None:
    row = logits(1)[0].numpy()
    ours = sampler(temperature=1.0)
    ours.accept(3)
    assert ours.adjusted(row) is row


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_of_the_vocabulary(token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token}: expected 0 to 499") as caught:
        sampler(logit_bias={token: 1.0})
    assert caught.value.param == "logit_bias"
    with pytest.raises(RequestError, match="the prompt has token"):
        RequestSampler(SamplingParams(repetition_penalty=2.0), {}, VOCAB, [token])


def test_no_stop_before_min_tokens() -> None:
    rows = logits(1)
    rows[0, [7, 8]] = torch.tensor([30.0, 29.0])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(8,))
    ours = RequestSampler(params, {}, VOCAB, [], eos_ids=[7])
    for position in range(3):
        [token], _ = sample(rows, [ours])
        assert (token == 7) == (position >= 2)
        assert token != 8
        ours.accept(token)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_model(count: int) -> None:
    rows = logits(2, spread=5.0)
    ours = [sampler(seed=i, temperature=2.0, logprobs=count, logit_bias={1: 100.0}) for i in range(2)]
    tokens, logprobs = sample(rows, ours)
    assert tokens == [1, 1]  # the bias decides, and is not in the log-probability
    for row, found in zip(rows.double().log_softmax(-1), logprobs, strict=True):
        assert found is not None
        assert (found.token_id, found.raw) == (1, b"<1>")
        assert math.isclose(found.logprob, row[1].item(), abs_tol=1e-5)
        values, ids = row.topk(count)
        assert [t.token_id for t in found.top] == ids.tolist()
        assert [t.raw for t in found.top] == [b"<%d>" % i for i in ids]
        np.testing.assert_allclose([t.logprob for t in found.top], values, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5, "repetition_penalty": 2.0}])
def test_logits_that_are_no_numbers(bad: float, params: dict[str, Any]) -> None:
    rows = logits(3)
    rows[1, 42] = bad
    ours = [sampler(seed=i, **params) for i in range(3)]
    with pytest.raises(LogitsError, match=rf"{bad} for token 42") as caught:
        sample(rows, ours)
    assert caught.value.row == 1
    others = sample(rows[[0, 2]], [ours[0], ours[2]])[0]
    assert others == sample(logits(3), ours)[0][::2]


def test_nothing_is_allowed() -> None:
    rows = torch.full((1, VOCAB), -math.inf)
    with pytest.raises(LogitsError, match="-inf for token 0"):
        sample(rows, [sampler(temperature=1.0)])
    rows[0, 7] = 0.0
    ours = RequestSampler(SamplingParams(min_tokens=1), {}, VOCAB, [], eos_ids=[7])
    with pytest.raises(LogitsError, match="no token is allowed"):
        sample(rows, [ours])


def test_other_shapes_are_refused() -> None:
    for rows in (logits(2), logits(1)[0], logits(1).double()):
        with pytest.raises(LogitsError, match="expected float32, one row for each of 1"):
            sample(rows, [sampler()])
