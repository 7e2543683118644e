"""The engine on a pool whose memory comes and goes: no answer changes, and memory is borrowed only if it has to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tests.engine.serving.fake_runner import Driver, FakeRunner, answer_to, prompt

from moesaic.engine.serving.params import SamplingParams
from moesaic.kvcache.paged import BlockPool, PagedSequence


@dataclass
class LentRunner(FakeRunner):
    """Has its first blocks; the others lose what they hold when nobody holds them at the end of a step."""

    own: int = 8
    asked: list[int] = field(default_factory=list)
    most: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pool = BlockPool(self.num_blocks, self.block_size, self, self.own)

    def extend(self, num_blocks: int) -> int:
        self.asked.append(num_blocks)
        self.most = max(self.most, num_blocks)
        return num_blocks

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        logits = super().decode(sequences, token_ids)
        self.pool.num_backed = max(self.own, self.pool.end)
        self.memory[self.pool.num_backed * self.block_size :] = -1
        return logits


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0)


def test_requests_at_random_in_a_pool_that_grows_and_shrinks() -> None:
    rng = random.Random(3)
    runner = LentRunner(num_blocks=60, max_batch=8)
    driver = Driver(runner, max_running=8)
    prompts: dict[str, list[int]] = {}
    while len(prompts) < 80 or driver.engine.has_work:
        if len(prompts) < 80 and rng.random() < 0.2:
            name = str(len(prompts))
            prompts[name] = prompt(rng.randrange(3), rng.randrange(1, 60)) + prompt(len(prompts), rng.randrange(1, 20))
            driver.add(name, prompts[name], greedy(rng.randrange(1, 40)))
        driver.step()
    for name, ids in prompts.items():
        assert driver.tokens(name) == answer_to(ids, len(driver.tokens(name)))
    driver.check_nothing_is_held()
    assert len(runner.asked) > 10 and 30 < runner.most <= 60


def test_what_nobody_uses_is_forgotten_before_memory_is_borrowed() -> None:
    runner = LentRunner(num_blocks=60, own=8)
    driver = Driver(runner)
    for number in range(6):  # 5 blocks each: the first stay for their contents as long as there is room
        driver.add(str(number), prompt(number, 17), greedy(3))
        driver.run()
    assert runner.asked == [] and driver.engine.stats().blocks_cached > 0
    driver.add("long", prompt(9, 100), greedy(3))
    driver.run()
    assert max(runner.asked) == 26
    before = runner.prefilled
    driver.add("again", [*prompt(9, 100), *driver.tokens("long"), 1], greedy(3))  # the next turn of a conversation
    driver.run()
    assert runner.prefilled - before < 20


def test_memory_that_was_borrowed_for_contents_goes_back_after_a_while() -> None:
    runner = LentRunner(num_blocks=60, own=8)
    driver = Driver(runner)
    driver.add("long", prompt(9, 100), greedy(3))
    driver.run()
    assert runner.pool.num_backed > 20
    runner.now += 200.0
    driver.add("short", prompt(1, 5), greedy(8))
    driver.run()
    assert runner.pool.num_backed <= 8 + 3  # what has just been used may stay
    assert driver.tokens("short") == answer_to(prompt(1, 5), 8)
    driver.check_nothing_is_held()
