"""Times and speeds of answers, computed by hand."""

from __future__ import annotations

from moesaic.engine.serving.outputs import RequestStats
from moesaic.server.timings import Timings, make_timings


def test_one_answer() -> None:
    stats = RequestStats(100, 40, 21, 0.25, 1.5, 4.0, expert_hits=3, expert_lookups=8)
    # 60 tokens in 1.5 s are 40/s; 20 after the first in 4 s are 5/s
    assert make_timings([[stats]]) == Timings(250.0, 40, 60, 1500.0, 40.0, 21, 4000.0, 5.0, 3, 8)


def test_several_answers_to_several_prompts() -> None:
    first = [RequestStats(10, 0, 5, 0.0, 1.0, 2.0), RequestStats(10, 0, 3, 0.5, 1.0, 1.0)]
    second = [RequestStats(30, 20, 1, 0.25, 0.5, 0.0)]
    # a prompt is counted once: 10 + 30 tokens, 20 of them cached; 4 + 2 + 0 tokens after the first ones in 2 s
    assert make_timings([first, second]) == Timings(500.0, 20, 20, 1000.0, 20.0, 9, 2000.0, 3.0, 0, 0)


def test_no_time_gives_no_speed() -> None:
    timings = make_timings([[RequestStats(5, 5, 1)]])
    assert (timings.prompt_per_second, timings.predicted_per_second) == (None, None)
    assert make_timings([]).predicted_n == 0
