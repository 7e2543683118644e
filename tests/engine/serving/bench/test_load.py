"""What a benchmark asks follows from its seed."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from moesaic.engine.serving.bench.load import Lengths, arrival_times, make_requests
from moesaic.errors import ConfigError


def test_lengths_are_read() -> None:
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("64-256") == Lengths(64, 256)
    assert (str(Lengths(5, 5)), str(Lengths(5, 7))) == ("5", "5 to 7")


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "a", "5-", "1-2-3", "1.5"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no length"):
        Lengths.parse(text)


def test_requests_follow_from_the_seed() -> None:
    lengths = Lengths(3, 9), Lengths(1, 4)
    made = make_requests(50, *lengths, 100, seed=7)
    assert made == make_requests(50, *lengths, 100, seed=7)
    assert made[:10] == make_requests(10, *lengths, 100, seed=7)
    assert made != make_requests(50, *lengths, 100, seed=8)
    assert {len(each.prompt_ids) for each in made} == set(range(3, 10))
    assert {each.num_tokens for each in made} == set(range(1, 5))
    assert all(0 <= token < 100 for each in made for token in each.prompt_ids)


def test_prompts_share_their_beginning_but_never_their_last_token() -> None:
    made = make_requests(20, Lengths(8, 8), Lengths(1, 1), 10**9, shared_prefix=5)
    assert len({each.prompt_ids[:5] for each in made}) == 1
    assert len({each.prompt_ids[5] for each in made}) == 20
    short = make_requests(20, Lengths(4, 4), Lengths(1, 1), 10**9, shared_prefix=5)
    assert len({each.prompt_ids[:3] for each in short}) == 1
    assert len({each.prompt_ids[3] for each in short}) == 20


def test_fixed_arrivals() -> None:
    assert arrival_times(4, 2.0, "fixed") == [0.0, 0.5, 1.0, 1.5]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    times = arrival_times(4001, 5.0, "poisson", seed=3)
    assert times == arrival_times(4001, 5.0, "poisson", seed=3)
    assert times != arrival_times(4001, 5.0, "poisson", seed=4)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0 and min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.07)  # of an exponential distribution both are the same
