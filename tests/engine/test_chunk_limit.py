"""What is learnt of chunks for which the memory did not suffice: numbers of tokens, without any memory."""

from __future__ import annotations

import logging

import pytest

from moesaic.engine.gpu.chunk_limit import _MOST_PATIENCE, _PATIENCE, ChunkLimit


def through(limit: ChunkLimit, num_tokens: int, room: int) -> list[int]:
    """A chunk where there is memory for `room` tokens; the pieces that were tried, in order."""
    tried, left = list[int](), limit.pieces(num_tokens)
    while left:
        tried.append(left[0])
        if left[0] > room:
            assert limit.can_cut(left[0])
            limit.failed(left[0], "too little.")
            left = limit.pieces(sum(left))
        else:
            limit.passed(left.pop(0))
    return tried


def test_pieces_are_few_and_alike() -> None:
    limit = ChunkLimit(8192, 512)
    assert limit.pieces(8192) == [8192] and limit.size is None
    limit.failed(5000, "")
    assert limit.size == 2500
    assert limit.pieces(8192) == [2048] * 4 and limit.pieces(2501) == [1251, 1250] and limit.pieces(7) == [7]
    assert [limit.can_cut(count) for count in (512, 513)] == [False, True]
    limit.failed(600, "")
    assert limit.size == 512


def test_what_failed_is_not_tried_again_at_once() -> None:
    limit = ChunkLimit(8192, 512)
    assert through(limit, 8192, 2048) == [8192, 4096, 2048, 2048, 2048, 2048]
    assert through(limit, 8192, 2048) == [2048] * 4 and limit.failures == 2


def test_it_grows_back_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moesaic.gpu")
    limit = ChunkLimit(8192, 512)
    through(limit, 8192, 2048)
    for _ in range(_PATIENCE // 4 - 1):
        assert through(limit, 8192, 8192) == [2048] * 4
    assert through(limit, 8192, 8192) == [4096] * 2
    for _ in range(_PATIENCE // 2):  # the piece that was a trial does not count
        assert through(limit, 8192, 8192) == [4096] * 2
    assert through(limit, 8192, 8192) == [8192] and limit.size is None
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "4096 tokens from now on" in warnings[0] and warnings[0].endswith("too little.")
    assert "8192 tokens again" in caplog.messages[-1]


def test_trials_that_fail_become_rare() -> None:
    limit, between, failures = ChunkLimit(8192, 512), list[int](), 1
    through(limit, 8192, 4096)
    passed = 2
    for _ in range(200):
        tried = through(limit, 8192, 4096)
        if limit.failures > failures:
            between.append(passed)
            failures, passed = limit.failures, 0
        passed += tried.count(4096)
    assert between[:4] == [_PATIENCE, 2 * _PATIENCE, 4 * _PATIENCE, 8 * _PATIENCE]
    assert set(between[3:]) == {_MOST_PATIENCE} and limit.size == 4096


def test_short_prompts_say_nothing_of_long_ones() -> None:
    limit = ChunkLimit(8192, 512)
    through(limit, 8192, 4096)
    for _ in range(10 * _PATIENCE):
        assert through(limit, 2048, 8192) == [2048]
    assert through(limit, 8192, 4096) == [4096] * 2
