"""Numbers of loads against those calculated by hand."""

from __future__ import annotations

import pytest

from moesaic.engine.serving.bench.drive import Record
from moesaic.engine.serving.bench.figures import decode_rate, gaps, load_figures, percentile


def answer(asked: float, *times: float, user: int = 0, counts: list[int] | None = None, cached: int = 0) -> Record:
    """One whose pieces came at these times, a token each unless said otherwise."""
    made = counts or [1] * len(times)
    return Record(user, 10, asked, list(times), made, [], cached, sum(made), times[-1])


def failed(asked: float, ended: float, error: str) -> Record:
    return Record(0, 10, asked, ended=ended, error=error)


def test_percentiles_lie_between_the_nearest_two() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile(range(101), 99) == 99
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)


def test_a_load_by_hand() -> None:
    records = [
        answer(10.0, 10.5, 10.6, 10.8, cached=4),  # gaps of 100 and 200 ms
        answer(11.0, 12.0, 12.4),  # 400 ms
        failed(11.5, 14.0, "429: busy"),
        failed(11.5, 13.0, "429: busy"),
        failed(11.5, 13.0, "other"),
    ]
    figures = load_figures(records, via="http", rate=2.0)
    assert (figures.requests, figures.failed, figures.errors) == (5, 3, (("429: busy", 2), ("other", 1)))
    assert figures.seconds == pytest.approx(4.0)
    assert (figures.prompt_tokens, figures.cached_tokens, figures.generated_tokens) == (20, 4, 5)
    assert figures.ttft_p50 == pytest.approx(750) and figures.ttft_p99 == pytest.approx(995)
    assert figures.itl_p50 == pytest.approx(200) and figures.itl_max == pytest.approx(400)
    assert figures.itl_p99 == pytest.approx(396)
    assert figures.requests_per_second == pytest.approx(0.5)
    assert figures.tokens_per_second == pytest.approx(1.25)
    assert (figures.via, figures.users, figures.rate, figures.decode_tokens_per_second) == ("http", None, 2.0, None)


def test_if_all_fail_there_are_no_latencies() -> None:
    figures = load_figures([failed(1.0, 2.0, "no")], users=1)
    assert (figures.failed, figures.ttft_p50, figures.itl_max, figures.decode_tokens_per_second) == (
        1,
        None,
        None,
        None,
    )
    assert figures.tokens_per_second == 0


def test_gaps_are_between_pieces() -> None:
    assert gaps(answer(0.0, 1.0, 1.5, 3.5)) == [0.5, 2.0]
    assert gaps(answer(0.0, 1.0)) == []


def test_the_decode_rate_is_that_while_all_decode() -> None:
    one = answer(0.0, *[0.1 * step for step in range(1, 101)], user=0)  # 10 tokens a second from 0.1 to 10
    two = answer(0.0, *[2 + 0.25 * step for step in range(13)], user=1)  # 4 tokens a second from 2 to 5
    assert decode_rate([one], 1) == pytest.approx(10)
    assert decode_rate([one, two], 2) == pytest.approx(14)
    assert decode_rate([one, two], 3) is None


def test_the_decode_rate_has_no_edges() -> None:
    """Ends of the time at which all decode fall into the middle of tokens, which count in part."""
    one = answer(0.0, 0.0, 1.0, 2.0, 3.0, user=0)
    two = answer(0.0, 0.5, 1.5, 2.5, user=1)
    assert decode_rate([one, two], 2) == pytest.approx(2.0)  # from 0.5 to 2.5, a token a second each


def test_times_at_which_fewer_decode_do_not_count() -> None:
    """Two rounds of two users; in between one of them waits for a prompt."""
    first = [answer(0.0, 1.0, 2.0, 3.0, user=user) for user in (0, 1)]
    slow = answer(3.0, 10.0, 11.0, 12.0, user=0)
    fast = answer(3.0, 4.0, *[5.0 + step for step in range(10)], user=1)
    assert decode_rate([*first, slow, fast], 2) == pytest.approx(2.0)


def test_pieces_may_have_several_tokens() -> None:
    one = answer(0.0, 1.0, 2.0, 3.0, counts=[1, 3, 5])
    assert decode_rate([one], 1) == pytest.approx(4.0)
    together = answer(0.0, 1.0, 2.0, 2.0, 3.0)  # two pieces at once
    assert decode_rate([together], 1) == pytest.approx(1.5)
