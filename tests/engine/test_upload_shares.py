"""What share of misses is uploaded, on computers whose steps take what the tests make up."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.engine.gpu.upload_shares import ALL, UploadShares, expected_share, numbers_of

LAYERS = 58
REST = 120e-6  # of a layer: attention, router, hand-off


class Decoding:
    """Steps of a model with 8 experts per token and layer.

    Args:
        link: seconds of an expert on the link.
        cpu: seconds of an expert on the CPU.
        dram: seconds that an expert takes whoever reads it.
        overhead: seconds of a layer's uploads, whatever they are.
    """

    def __init__(
        self, link: float, cpu: float, dram: float = 0.0, overhead: float = 8e-6, noise: float = 0.03, seed: int = 0
    ) -> None:
        self.link, self.cpu, self.dram, self.overhead, self.noise = link, cpu, dram, overhead, noise
        self.shares = UploadShares(expected_share(8, link, cpu))
        self.random = np.random.default_rng(seed)
        self.missing = 8

    def clean(self, share: int, batch: int = 1) -> float:
        """Seconds of a step without noise."""
        missing = min(64, self.missing * batch)
        number = numbers_of(share, 64, 16)[missing]
        busy = max(number * self.link, (missing - number) * self.cpu, missing * self.dram)
        return LAYERS * (REST + busy + (self.overhead if share else 0.0))

    def best(self, batch: int = 1) -> float:
        return min(self.clean(share, batch) for share in range(ALL + 1))

    def run(self, steps: int, batch: int = 1) -> float:
        """Seconds of all steps over those of as many without uploads."""
        total = bare = 0.0
        for _ in range(steps):
            factor = 1 + self.noise * abs(self.random.standard_normal())
            if self.random.random() < 0.01:
                factor *= 3  # something else ran
            seconds = factor * self.clean(self.shares.begin(batch), batch)
            self.shares.observe(seconds)
            total, bare = total + seconds, bare + factor * self.clean(0, batch)
        return total / bare


def test_numbers_of_a_share() -> None:
    assert numbers_of(0, 8, 16) == [0] * 9
    assert numbers_of(3, 8, 16)[8] == 3 and numbers_of(8, 8, 16) == list(range(9))
    assert numbers_of(4, 4, 16) == [0, 1, 1, 2, 2]
    assert numbers_of(8, 32, 6)[6:] == [6] * 27


def test_what_is_expected() -> None:
    assert expected_share(8, per_upload=1.0, per_expert=1.0) == 4
    assert expected_share(8, per_upload=0.01, per_expert=1.0) == 8
    assert expected_share(8, per_upload=7.0, per_expert=1.0) == 1
    assert expected_share(8, per_upload=8.0, per_expert=1.0) == 0
    assert expected_share(4, per_upload=1.0, per_expert=3.0) == 5  # three of four, as with 6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("link", "cpu"), [(160e-6, 250e-6), (160e-6, 2e-3), (20e-6, 27e-6), (450e-6, 600e-6)])
def test_a_cpu_that_computes_slowly_gives_away_what_pays(link: float, cpu: float, seed: int) -> None:
    decoding = Decoding(link, cpu, seed=seed)
    assert decoding.run(100) < 1.0
    decoding.run(300)
    bound = decoding.best() / decoding.clean(0)
    assert decoding.run(400) < 1.04 * bound


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cpu", [24e-6, 250e-6, 1e-3])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.8, 4.0, 7.0])
def test_nothing_is_lost_where_the_memory_is_the_limit(cpu: float, ratio: float, seed: int) -> None:
    """The CPU reads as fast as the memory gives: uploads are only overhead, whatever was expected."""
    decoding = Decoding(ratio * cpu, cpu, dram=cpu, seed=seed)
    assert decoding.run(200) <= 1.03
    assert decoding.run(1000) <= 1.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slower", [3.0, 10.0, 50.0])
def test_a_link_that_is_slower_than_was_measured(slower: float, seed: int) -> None:
    decoding = Decoding(160e-6, 250e-6, seed=seed)
    decoding.link *= slower
    assert decoding.run(300) <= (1.03 if slower < 20 else 1.06)
    assert decoding.run(1000) <= 1.02


@pytest.mark.parametrize("seed", range(4))
def test_conditions_that_change(seed: int) -> None:
    decoding = Decoding(160e-6, 250e-6, seed=seed)
    decoding.run(400)
    decoding.link *= 20  # somebody else uses it
    decoding.run(100)
    assert decoding.run(1000) <= 1.02
    decoding.link /= 20
    decoding.run(3000)
    assert decoding.run(500) < 1.05 * decoding.best() / decoding.clean(0)
    decoding.missing = 3  # the cache is warm
    decoding.run(300)
    assert decoding.run(500) < 1.05 * decoding.best() / decoding.clean(0)


def test_batches_have_shares_of_their_own() -> None:
    decoding = Decoding(160e-6, 250e-6)
    for _ in range(60):
        for batch in (1, 4):
            decoding.run(10, batch)
    assert decoding.run(200, 1) < 1.05 * decoding.best(1) / decoding.clean(0, 1)
    assert decoding.run(200, 4) < 1.05 * decoding.best(4) / decoding.clean(0, 4)


def test_steps_that_are_not_quiet_say_nothing() -> None:
    shares = UploadShares(4)
    for _ in range(50):
        assert shares.begin(1, is_quiet=False) == 0
        shares.observe(1.0, is_quiet=False)
    assert shares.usual(1) == 0


def until_settled(decoding: Decoding, most: int = 3000) -> int:
    """Steps until shares are settled."""
    for step in range(most):
        if decoding.shares.is_settled(1):
            return step
        decoding.run(1)
    raise AssertionError("they never settle")


def shares_of(decoding: Decoding, steps: int) -> set[int]:
    """Of the next steps."""
    found = set()
    for _ in range(steps):
        share = decoding.shares.begin(1)
        assert share == decoding.shares.usual(1) or not decoding.shares.is_settled(1)
        decoding.shares.observe(decoding.clean(share))
        found.add(share)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("link", "cpu", "dram"),
    [(160e-6, 250e-6, 0.0), (20e-6, 27e-6, 0.0), (450e-6, 600e-6, 0.0), (250e-6, 250e-6, 250e-6)],
)
def test_settled_shares_are_the_best_and_stay(link: float, cpu: float, dram: float, seed: int) -> None:
    """Its neighbours are no quicker, by the times that were made up, and the next steps try nothing."""
    decoding = Decoding(link, cpu, dram, noise=0.003, seed=seed)
    assert not decoding.shares.is_settled(1)
    assert until_settled(decoding) > 20
    usual = decoding.shares.usual(1)
    around = [share for share in (0, usual - 1, usual + 1) if 0 <= share <= ALL]
    assert decoding.clean(usual) < 1.025 * min(decoding.clean(share) for share in around)
    assert shares_of(decoding, 60) == {usual}
    assert not decoding.shares.is_settled(2)  # of which nothing is known


def test_a_trial_that_is_repeated_is_not_settled_while_it_runs() -> None:
    decoding = Decoding(160e-6, 250e-6, noise=0.0)
    until_settled(decoding)
    assert len(shares_of(decoding, 3000)) > 1


def test_shares_are_not_settled_any_more_when_steps_take_another_time() -> None:
    decoding = Decoding(160e-6, 250e-6, noise=0.003)
    until_settled(decoding)
    decoding.link *= 20
    decoding.run(20)
    assert not decoding.shares.is_settled(1)
    until_settled(decoding)
    assert decoding.shares.usual(1) == 0
