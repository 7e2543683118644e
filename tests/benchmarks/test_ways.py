"""Steps with and without a cache, or uploads, on one runner: whoever learns from steps sees its own only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, OPTIONS, on_gpu, some_uploads

import read_ahead
from cache_ways import PROFILE_TOKENS, CacheWays
from expert_cache_gpu import Options, line
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.upload_shares import UploadShares
from paired_turns import take_turn
from read_ahead import AheadWays
from timed_decode import PROMPT, TimedDecode
from upload_ways import UploadWays


def a_runner(**options: Any) -> ModelRunner:
    runner: ModelRunner = on_gpu("qwen3_moe", ON_GPU, replace(OPTIONS, max_batch=2), **options).runner
    return runner


def test_sequences_begin_anew_when_they_are_long() -> None:
    runner = a_runner()
    decode = TimedDecode(runner, batch=2, longest=PROMPT + 2)
    assert decode.renew() and not decode.renew()
    for _ in range(2):
        assert decode.step() > 0.0
    assert [sequence.length for sequence in decode._sequences] == [PROMPT + 2] * 2
    assert decode.renew() and decode._sequences[0].length == PROMPT
    decode.close()
    assert runner.pool.num_free == OPTIONS.num_blocks


def test_a_cache_sees_its_own_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = a_runner()
    ways = CacheWays(runner)
    shape, top_k = (len(runner.decoder.routed), runner.decoder.routed[0].num_experts), runner.decoder.top_k
    policy, told = PromotionPolicy(*shape, 5, share=1.0), list[tuple[int, int]]()
    record = policy.record
    monkeypatch.setattr(
        policy, "record", lambda uses, tokens: (told.append((uses.sum(), tokens)), record(uses, tokens))
    )
    ways.set_cache(5, policy)
    ways.warm_up(8)
    for _ in range(2):
        take_turn(ways, 3)
    # 8 steps and 12; told every 8, or later if a step was disturbed by copies, and never of another step
    assert sum(tokens for _, tokens in told) in range(16, 21)
    assert all(uses == tokens * shape[0] * top_k for uses, tokens in told)
    assert int(policy.uses.sum()) == sum(uses for uses, _ in told)
    all_uses = int(runner.server.uses.numpy().view(np.uint32).sum())
    assert all_uses == (1 + 8 + 1 + 2 * (6 + 2 + 6)) * shape[0] * top_k  # a step after each switch, and one at first
    counts = ways.counts()
    assert ways.steps == 12 and counts["slots"] == 5 and 0 < counts["held"] <= 5
    assert runner.slots.cache is None  # a turn ends without


def test_a_profile_fills_the_slots_with_the_busiest() -> None:
    runner = a_runner()
    ways = CacheWays(runner)
    shape = len(runner.decoder.routed), runner.decoder.routed[0].num_experts
    profile = np.random.default_rng(0).permutation(shape[0] * shape[1]).reshape(shape) * PROFILE_TOKENS // 100
    for slots in (3, 6):
        ways.set_cache(slots, profile=profile)
        held = ways.cache.policy.slot_of >= 0
        assert np.array_equal(held, profile >= np.sort(profile, axis=None)[-slots])
    ways.warm_up(2)
    assert ways.counts()["held"] == 6


def test_uploads_learn_from_their_own_steps_only() -> None:
    runner = a_runner(uploads=some_uploads)
    runner.uploads.shares = UploadShares(4)
    seen: list[float] = []
    runner.uploads.shares.observe = lambda seconds, is_quiet=True: seen.append(seconds)  # type: ignore[method-assign]
    ways = UploadWays(runner, runner.uploads, 2)
    before = runner.uploads.statistics(2)
    assert before.share is None  # numbers are fixed: none
    for turn in range(1, 3):
        take_turn(ways, 2)
        assert len(seen) == 4 * turn and len(ways.shares) == turn
    assert not any(runner.uploads.fixed)


def test_rows_have_as_many_cells() -> None:
    finding = {"ratio": 1.2, "low": 1.1, "high": 1.3, "whole": 1.21, "whole_low": 1.0, "whole_high": 1.4, "turns": 9}
    counts = {"slots": 10, "held": 9, "hit_rate": 0.2, "copies_per_token": 0.5}
    times = {"without_ms": [10.0, 30.0], "with_ms": [8.0, 8.0], "verdict": "kept"}
    of_gain = {"part": "gain", "exponent": 0.8, "size": 0.03}
    of_promise = {"part": "promise", "eager": True, "link": "slow", "threads": 2}
    lines = [
        line(of_gain | counts | finding | times | {"best": 0.25}),
        line(of_promise | counts | finding | times),
        line(of_gain | {"problem": "not run"}),
    ]
    assert len({text.count("|") for text in lines}) == 1
    assert "| 20.0% of 25.0% | 0.50 | 50.00 | 125.00 | 1.200 (1.100-1.300) |" in lines[0]
    assert lines[1].endswith("| kept, 9 turns |")


def test_rows_share_the_time_that_is_left() -> None:
    options = Options(0.01, until=100.0, clock=lambda: 20.0)
    assert options.left() == 80.0 and options.share(4) == 18.0


def test_steps_with_forecasts_have_some_and_the_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = a_runner(uploads=some_uploads)
    ways, told = AheadWays(runner), list[int]()
    foretold = runner.server.mailbox.foretold
    step = ways.decode.step

    def counted() -> float:
        foretold.zero_()
        seconds = step()
        told.append(int(foretold[0] > 0))
        return seconds

    ways.use(False)
    ways.decode.step = counted
    take_turn(ways, 2)
    # one that begins the sequence, two without, four with and two without, and one after each switch
    assert told == [0] * 3 + [1] * 5 + [0] * 3
    ways.decode.close()
    monkeypatch.setattr(read_ahead, "STEPS", 2)
    monkeypatch.setattr(read_ahead, "take_turns", lambda ways, block, *_: [take_turn(ways, 1), take_turn(ways, 1)])
    (line,) = read_ahead.rows(runner, [8], 0.01)
    assert "ratio" in line and "between" in line
    assert runner.uploads.fixed == [0, 1, 2, *[3] * (len(runner.uploads.fixed) - 3)]
