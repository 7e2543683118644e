"""The engine on a fake runner: every answer is that of its prompt alone, whatever else happens."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import pytest
from tests.engine.serving.fake_runner import GREEDY, VOCAB_SIZE, Driver, FakeRunner, answer_to, next_token, prompt

from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import ExpertTimeoutError, GenerationError, RequestError


def greedy(count: int, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["paged", "without a prefix cache", "recurrent"])
def test_many_answers_are_those_of_their_prompts_alone(kind: str) -> None:
    driver = Driver(FakeRunner(num_blocks=400, recurrent=kind == "recurrent"), prefix_cache=kind == "paged")
    lengths = [1, 2, 3, 4, 5, 17, 64, 65, 150, 300]
    for number, length in enumerate(lengths):
        driver.add(str(number), prompt(number, length), greedy(3 + number))
    driver.run()
    for number, length in enumerate(lengths):
        assert driver.tokens(str(number)) == answer_to(prompt(number, length), 3 + number)
    driver.check_nothing_is_held()
    assert driver.engine.stats().preemptions == 0
    assert driver.engine.stats().prompt_tokens == sum(lengths)


@pytest.mark.parametrize("recurrent", [False, True])
def test_requests_come_and_are_cancelled_at_random_in_a_tiny_pool(recurrent: bool) -> None:
    """100 requests with common beginnings, a fifth of them cancelled, in 40 blocks."""
    rng = random.Random(5)
    driver = Driver(FakeRunner(num_blocks=40, recurrent=recurrent, max_batch=8), max_running=8)
    prompts: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    while len(prompts) < 100 or driver.engine.has_work:
        if len(prompts) < 100 and rng.random() < 0.3:
            name = str(len(prompts))
            prompts[name] = prompt(rng.randrange(3), rng.randrange(1, 60)) + prompt(len(prompts), rng.randrange(1, 20))
            driver.add(name, prompts[name], greedy(rng.randrange(1, 60), n=rng.choice([1, 1, 3])))
            if rng.random() < 0.2:
                cancelled.add(name)
        for name in [each for each in cancelled if each in driver.engine._answers]:
            if rng.random() < 0.1:
                driver.engine.cancel(name)
        driver.step()
    for name, ids in prompts.items():
        for completion in driver.answers[name].values():
            assert completion.finish_reason in ({"length", "cancelled"} if name in cancelled else {"length"})
            assert completion.token_ids == answer_to(ids, len(completion.token_ids))
            assert completion.stats.generated_tokens == len(completion.token_ids)
    assert driver.engine.stats().preemptions > 0
    assert sum(count for _, count in driver.engine.stats().finished) == sum(map(len, driver.answers.values()))
    driver.check_nothing_is_held()


def test_preemption_takes_the_latest_and_changes_no_answer() -> None:
    driver = Driver(FakeRunner(num_blocks=8), prefix_cache=False)
    for number in range(3):
        driver.add(str(number), prompt(number, 6), greedy(14))
    driver.run()
    for number in range(3):
        assert driver.tokens(str(number)) == answer_to(prompt(number, 6), 14)
    assert driver.engine.stats().preemptions > 0
    assert driver.times["0"][-1] < driver.times["2"][-1]


def test_a_beginning_that_was_computed_is_not_computed_again() -> None:
    runner = FakeRunner(num_blocks=200)
    driver = Driver(runner)
    common = prompt(0, 100)
    driver.add("first", [*common, 1, 2, 3])
    driver.run()
    before = runner.prefilled
    driver.add("second", [*common, 4, 5])
    driver.add("the same", [*common, 1, 2, 3])
    driver.add("its answer too", [*common, 1, 2, 3, *driver.tokens("first"), 9])
    driver.run()
    assert [driver.answers[name][0].stats.cached_tokens for name in ("second", "the same")] == [100, 100]
    assert driver.answers["its answer too"][0].stats.cached_tokens == 112  # of 103 + 11 that were computed
    assert runner.prefilled - before == 2 + 3 + (103 + 12 + 1 - 112)
    assert driver.tokens("second") == answer_to([*common, 4, 5], 12)
    assert driver.tokens("the same") == driver.tokens("first")
    assert driver.engine.stats().cached_tokens == 100 + 100 + 112


def test_a_prompt_of_whole_blocks_computes_its_last_one() -> None:
    driver = Driver(FakeRunner())
    for name in ("first", "second"):
        driver.add(name, prompt(0, 16))
        driver.run()
    assert driver.answers["second"][0].stats.cached_tokens == 12
    assert driver.tokens("second") == driver.tokens("first") == answer_to(prompt(0, 16), 12)


def test_answers_to_one_prompt_share_its_blocks() -> None:
    runner = FakeRunner(num_blocks=40)
    driver = Driver(runner)
    driver.add("three", prompt(0, 103), greedy(5, n=3))
    driver.run()
    assert [driver.tokens("three", index) for index in range(3)] == [answer_to(prompt(0, 103), 5)] * 3
    assert runner.prefilled == 103 + 3 + 3
    assert driver.engine.stats().preemptions == 0  # thrice the prompt would not have fitted
    driver.check_nothing_is_held()


def test_answers_to_one_prompt_go_on_when_the_first_one_ends_early() -> None:
    driver = Driver(FakeRunner(num_layers=4, max_chunk=16))
    driver.add("other", prompt(1, 4), greedy(200))
    driver.step()
    driver.add("three", prompt(0, 60), greedy(5, n=3))
    driver.step()
    first = driver.engine._answers["three"][0]
    driver.engine._end(first, "error")
    driver.run()
    assert driver.answers["three"][0].finish_reason == "error"
    assert [driver.tokens("three", index) for index in (1, 2)] == [answer_to(prompt(0, 60), 5)] * 2
    driver.check_nothing_is_held()


def test_cancelling_frees_slot_and_blocks_within_two_steps() -> None:
    driver = Driver(FakeRunner(num_blocks=300, max_chunk=16), prefix_cache=False)
    driver.add("stays", prompt(0, 8), greedy(100))
    driver.step()
    for name, length in (("decodes", 20), ("is filled in", 400), ("waits", 800)):
        driver.add(name, prompt(1, length), greedy(90))
        driver.step()
        while name == "decodes" and not driver.tokens(name):
            driver.step()
    for name in ("decodes", "is filled in", "waits"):
        assert driver.answers[name][0].finish_reason is None
        driver.engine.cancel(name)
    for _ in range(2):
        driver.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting) == (1, 0)
    held = driver.runner.pool.blocks_for(8 + len(driver.tokens("stays")))
    assert stats.blocks_free >= 300 - held
    assert [driver.answers[name][0].finish_reason for name in ("decodes", "is filled in", "waits")] == ["cancelled"] * 3
    driver.run()
    assert driver.tokens("stays") == answer_to(prompt(0, 8), 100)


def test_where_answers_stop() -> None:
    ids = prompt(0, 10)
    expected = answer_to(ids, 30)
    end = expected[4]
    first = expected.index(end)
    driver = Driver(FakeRunner(num_blocks=10), frozenset({end}))
    driver.add("model's end", ids, greedy(30))
    driver.add("goes on", ids, greedy(7, ignore_eos=True))
    driver.add("own stop", ids, greedy(30, ignore_eos=True, stop_token_ids=(end,)))
    driver.add("full", ids, SamplingParams(temperature=0, ignore_eos=True))
    driver.add("only the prompt", ids, greedy(0))
    driver.run()
    got = {name: answers[0] for name, answers in driver.answers.items()}
    assert [got["model's end"].token_ids, got["model's end"].finish_reason] == [expected[: first + 1], "stop"]
    assert got["model's end"].stop is None
    assert [got["goes on"].token_ids, got["goes on"].finish_reason] == [expected[:7], "length"]
    assert [got["own stop"].token_ids, got["own stop"].stop] == [expected[: first + 1], end]
    assert [got["full"].token_ids, got["full"].finish_reason] == [answer_to(ids, 30), "length"]  # 10 blocks of 4
    assert [got["only the prompt"].token_ids, got["only the prompt"].finish_reason] == [[], "length"]
    driver.check_nothing_is_held()


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], GREEDY, "empty"),
        (prompt(0, 256), GREEDY, "has 256 tokens, but the maximum context length is 256 tokens"),
        ([1, VOCAB_SIZE], GREEDY, "token 97: expected 0 to 96"),
        ([1, -1], GREEDY, "token -1"),
        ([1], SamplingParams(stop_token_ids=(3, 97)), "stop_token_ids has token 97"),
        ([1], SamplingParams(logit_bias={-3: 1.0}), "logit_bias has token -3"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(ids: list[int], params: SamplingParams, message: str) -> None:
    driver = Driver(FakeRunner())
    with pytest.raises(RequestError, match=message):
        driver.engine.add("x", ids, params)
    assert not driver.engine.has_work


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_lost_step_is_done_again_and_a_second_one_ends_its_answers(recurrent: bool) -> None:
    driver = Driver(FakeRunner(recurrent=recurrent))
    driver.add("a", prompt(0, 9))
    for _ in range(4):
        driver.step()
    driver.runner.failures = [ExpertTimeoutError("too slow")]
    driver.run()
    assert driver.tokens("a") == answer_to(prompt(0, 9), 12)
    driver.add("b", prompt(1, 9))
    for _ in range(4):
        driver.step()
    driver.runner.failures = [ExpertTimeoutError("too slow"), ExpertTimeoutError("too slow")]
    driver.add("c", prompt(2, 30))
    driver.run()
    if not recurrent:  # there the second step is a prefill
        assert driver.answers["b"][0].finish_reason == "error"
    assert driver.tokens("c") == answer_to(prompt(2, 30), 12)
    driver.check_nothing_is_held()


class NotingRunner(FakeRunner):
    """Notes of each step whether it was to bring logits; at one they are no numbers."""

    def __init__(self, broken_after: int = 0) -> None:
        super().__init__()
        self.brought: list[bool] = []
        self.broken_after = broken_after

    def decode(self, sequences: Any, token_ids: Any) -> Any:
        self.brought.append(True)
        return super().decode(sequences, token_ids)

    def decode_likeliest(self, sequences: Any, token_ids: Any) -> list[int]:
        tokens = super().decode_likeliest(sequences, token_ids)
        self.brought[-1] = False
        return [-1] * len(tokens) if len(self.brought) == self.broken_after else tokens


@pytest.mark.parametrize(
    ("wants", "brought"),
    [
        ({}, [False] * 8),
        ({"logprobs": 1}, [True] * 4 + [False] * 4),
        ({"logit_bias": {3: 0.5}}, [True] * 4 + [False] * 4),
        ({"presence_penalty": 0.5}, [True] * 4 + [False] * 4),
        ({"min_tokens": 3, "stop_token_ids": (96,)}, [True] * 2 + [False] * 6),  # the first came with the prompt
    ],
)
def test_logits_are_brought_while_somebody_wants_more_than_the_likeliest_token(
    wants: dict[str, Any], brought: list[bool]
) -> None:
    runner = NotingRunner()
    driver = Driver(runner)
    driver.add("plain", prompt(0, 9), greedy(9))
    driver.add("other", prompt(1, 9), greedy(5, **wants))
    driver.run()
    assert driver.tokens("plain") == answer_to(prompt(0, 9), 9)
    assert len(driver.tokens("other")) == 5
    assert runner.brought == brought


def test_every_step_says_when_it_is_under_way() -> None:
    """Of decode when it is launched; otherwise before prompts, which take long."""
    runner, events = FakeRunner(), list[str]()
    driver = Driver(runner)
    runner.on_launch = lambda: events.append("launch")
    prefill = runner.start_prefill

    def noted(parts: Any) -> Any:
        events.append("prompt")
        return prefill(parts)

    runner.start_prefill = noted  # type: ignore[method-assign]
    driver.add("a", prompt(1, 9), greedy(3))
    driver.step()
    assert events == ["launch", "prompt"]
    driver.add("b", prompt(2, 9), greedy(2))
    driver.step()
    assert events[2] == "launch" and events[3:].count("prompt") <= 1
    driver.run()
    assert events.count("prompt") == 2


def test_drawn_tokens_need_logits() -> None:
    runner = NotingRunner()
    driver = Driver(runner)
    driver.add("drawn", prompt(1, 9), SamplingParams(max_tokens=4, temperature=1.0))
    driver.run()
    assert runner.brought == [True] * 3


def test_logits_that_are_no_numbers_end_an_answer() -> None:
    runner = NotingRunner(broken_after=3)
    driver = Driver(runner)
    driver.add("a", prompt(1, 9), greedy(9))
    driver.run()
    answer = driver.answers["a"][0]
    assert answer.finish_reason == "error" and answer.token_ids == answer_to(prompt(1, 9), 3)
    driver.check_nothing_is_held()


def test_a_request_whose_sampler_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(FakeRunner())
    for name in ("good", "bad", "also good"):
        driver.add(name, prompt(len(name), 9))
    driver.step()

    def fail(token: int) -> None:
        raise GenerationError("the grammar does not allow this token")

    monkeypatch.setattr(driver.engine._answers["bad"][0].sampler, "accept", fail)
    driver.run()
    assert driver.answers["bad"][0].finish_reason == "error"
    for name in ("good", "also good"):
        assert driver.tokens(name) == answer_to(prompt(len(name), 9), 12)
    driver.check_nothing_is_held()


@pytest.mark.parametrize("num_layers", [48, 1])
@pytest.mark.parametrize("users", [1, 8])
def test_a_long_prompt_does_not_hold_others_up(num_layers: int, users: int) -> None:
    """32k tokens of which a chunk of 2,048 takes 10 to 20 s alone, beside steps of 0.25 s."""

    def layer_seconds(tokens: int, position: int) -> float:
        return (0.2 + tokens * 4.8e-3 * (1 + position / 32768)) / num_layers  # experts are read; attention grows

    runner = FakeRunner(
        num_blocks=1 << 13,
        block_size=16,
        num_layers=num_layers,
        max_chunk=2048,
        layer_seconds=layer_seconds,
        decode_seconds=0.25,
    )
    if num_layers == 1:
        runner.layer_seconds = lambda tokens, position: 2e-3 * tokens * (1 + position / 32768)
    driver = Driver(runner)
    for number in range(users):
        driver.add(str(number), prompt(number, 50), SamplingParams(temperature=0, max_tokens=30000))
    while any(len(times) < 30 for times in driver.times.values()):
        driver.step()
    alone = statistics.median(_gaps(driver.times["0"][-20:]))
    driver.add("long", prompt(99, 32768), greedy(2))
    began = runner.now
    while not driver.tokens("long"):
        driver.step()
    for number in range(users):
        gaps = _gaps([time for time in driver.times[str(number)] if time >= began])
        assert max(gaps) <= 3 * alone
        assert statistics.median(gaps) <= 2.2 * alone
    assert driver.tokens("long")[0] == next_token(prompt(99, 32768))
    undisturbed = sum(num_layers * runner.layer_seconds(2048, 2048 * index) for index in range(16))
    assert runner.now - began < 1.25 * 2 * undisturbed


@pytest.mark.parametrize("first", [1, 5])
def test_a_crowd_that_comes_a_moment_late_does_not_wait_long(first: int) -> None:
    """Layers take about as long for few tokens as for many, and longer than a step of decode: nothing is known yet."""
    runner = FakeRunner(num_blocks=4000, num_layers=48, max_chunk=4096, decode_seconds=0.003 + 0.003 * first)
    runner.layer_seconds = lambda tokens, position: 5e-3 + 2e-6 * tokens
    driver = Driver(runner)
    for number in range(8):
        if number == first:
            driver.step()
        driver.add(str(number), prompt(number, 128), greedy(300))
    began = runner.now
    while not all(driver.tokens(str(number)) for number in range(8)):
        driver.step()
    assert runner.now - began < (1.7 if first == 1 else 0.65)
    assert max(_gaps(driver.times["0"])) <= 3 * runner.decode_seconds


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def test_nobody_decoding_a_prompt_takes_as_few_steps_as_it_has_chunks() -> None:
    driver = Driver(FakeRunner(num_blocks=200, num_layers=48, max_chunk=64))
    driver.add("a", prompt(0, 300), greedy(1))
    driver.run()
    assert driver.steps == 5


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    driver = Driver(FakeRunner(num_blocks=600, max_chunk=64))
    driver.add("long", prompt(0, 2000), greedy(1))
    driver.add("short", prompt(1, 20), greedy(1))
    driver.step()
    assert driver.tokens("short") == answer_to(prompt(1, 20), 1)


def test_times_of_an_answer() -> None:
    runner = FakeRunner(num_layers=4, layer_seconds=lambda tokens, position: 0.1)
    driver = Driver(runner, max_running=1)
    driver.add("first", prompt(0, 9), greedy(3))
    driver.add("second", prompt(1, 9), greedy(2))
    driver.run()
    first, second = (driver.answers[name][0].stats for name in ("first", "second"))
    assert (first.queue_seconds, first.prefill_seconds) == (0, pytest.approx(0.4))
    assert first.decode_seconds == pytest.approx(0.1)
    assert second.queue_seconds == pytest.approx(0.5)
    assert (second.prefill_seconds, second.decode_seconds) == (pytest.approx(0.4), pytest.approx(0.05))
    assert (first.prompt_tokens, first.generated_tokens, first.seed) == (9, 3, None)
