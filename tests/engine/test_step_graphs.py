"""Which graphs of decode steps there are and when they are captured, without a GPU and, if there is one, on it."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.pairs import relative_error

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, OPTIONS, TOLERANCE, checkpoint_of, eager_cache, inputs, on_gpu, some_uploads

from moesaic.engine.gpu.step_graphs import PATIENCE, Bucket, StepGraphs


class Maker:
    """Notes what is to be launched; uploads are there for up to 8 sequences."""

    def __init__(self, most_with_memory: int = 64, uploads: bool = True) -> None:
        self.done: list[tuple[str, int, bool]] = []
        self.pools: list[Any] = []
        self.most_with_memory, self.uploads = most_with_memory, uploads

    def new_bucket(self, size: int) -> Bucket:
        return Bucket(None, torch.zeros(size, 1), torch.zeros(size), torch.zeros(size), size)  # type: ignore[arg-type]

    def ways(self, size: int) -> tuple[bool, ...]:
        return (False, True) if self.uploads and size <= 8 else (False,)

    def warm_up(self, bucket: Bucket, brings: bool) -> None:
        if bucket.size > self.most_with_memory:
            raise torch.cuda.OutOfMemoryError("no memory")
        self.done.append(("warm", bucket.size, brings))

    def capture(self, bucket: Bucket, brings: bool, pool: Any) -> Any:
        assert self.done[-1] == ("warm", bucket.size, brings) or ("warm", bucket.size, brings) in self.done
        self.done.append(("capture", bucket.size, brings))
        self.pools.append(pool)
        own = object() if pool is None else pool
        return SimpleNamespace(pool=lambda: own)

    @property
    def captured(self) -> list[tuple[int, bool]]:
        return [(size, brings) for what, size, brings in self.done if what == "capture"]


def graphs_of(maker: Maker, max_batch: int = 32, captures: bool = True) -> StepGraphs:
    return StepGraphs(maker, max_batch, captures)


def test_sizes_are_prepared_smallest_first_a_piece_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker()
    graphs = graphs_of(maker)
    for brings in (False, graphs.brings(graphs.bucket(1), at_once=True)):
        assert brings in graphs.buckets[1].graphs
    maker.done = []
    pieces = 0
    with caplog.at_level(logging.INFO, "moesaic.gpu"):
        while graphs.prepare(20):
            pieces += 1
            assert len(maker.done) == pieces  # a kernel's step or a capture, and no more
    assert maker.captured == [*((size, False) for size in (2, 4, 8, 16, 32)), *((size, True) for size in (2, 4, 8))]
    assert pieces == 2 * len(maker.captured)
    assert "decode steps of 1, 2, 4, 8, 16, 32 sequences have graphs" in caplog.text
    assert not graphs.prepare(20) and caplog.text.count("have graphs") == 1


def test_no_more_is_prepared_than_can_run_at_once() -> None:
    maker = Maker(uploads=False)
    graphs = graphs_of(maker, max_batch=24)
    while graphs.prepare(3):
        pass
    assert maker.captured == [(1, False), (2, False), (4, False)]
    while graphs.prepare(64):
        pass
    assert [size for size, _ in maker.captured[3:]] == [8, 16, 24]


def test_graphs_share_one_pool_of_memory() -> None:
    maker = Maker()
    graphs = graphs_of(maker)
    while graphs.prepare(32):
        pass
    assert maker.pools[0] is None and len(set(map(id, maker.pools[1:]))) == 1 and maker.pools[1] is not None
    graphs.buckets = {}  # whose pool is gone
    graphs.bucket(1)
    assert maker.pools[-1] is None


def test_a_crowd_waits_for_one_capture(caplog: pytest.LogCaptureFixture) -> None:
    """Those who come first do not have the sizes on the way captured, and fewer take what is there."""
    maker = Maker()
    graphs = graphs_of(maker)
    graphs.bucket(1)
    graphs.expected = 7
    for count in (1, 2, 3, 5, 7, 6, 2):
        bucket = graphs.bucket(count)
        assert bucket.is_ready and bucket.size == (1 if count == 1 else 8)
    assert maker.captured == [(1, False), (8, False)]
    graphs.expected = 50
    assert graphs.bucket(9).size == 32
    assert graphs.bucket(30).size == 32


def test_a_size_that_is_used_often_gets_its_own_graph() -> None:
    maker = Maker()
    graphs = graphs_of(maker)
    graphs.prepares = True
    graphs.bucket(8)
    for _ in range(PATIENCE):
        assert graphs.bucket(3).size == 8
        assert not graphs.brings(graphs.buckets[8], at_once=False)
    assert maker.captured == [(8, False)]
    assert graphs.bucket(3).size == 4
    assert graphs.brings(graphs.buckets[8], at_once=False)
    assert maker.captured == [(8, False), (4, False), (8, True)]
    assert not graphs.brings(graphs.buckets[4], at_once=False)  # begins to count
    assert graphs.brings(graphs.buckets[4], at_once=True)


def test_all_graphs_of_the_size_that_fits_best() -> None:
    """A larger one that is there does, but is not it; nor is the one without uploads alone."""
    graphs = graphs_of(Maker())
    graphs.bucket(8)
    assert not graphs.has_all(8) and not graphs.has_all(3)
    graphs.brings(graphs.buckets[8], at_once=True)
    assert graphs.has_all(8) and graphs.has_all(5) and not graphs.has_all(3)
    graphs.bucket(12)
    assert graphs.has_all(12)  # which has no uploads
    assert graphs_of(Maker(), captures=False).has_all(3)


def test_uploads_come_at_once_where_nobody_prepares_them() -> None:
    """As in `generate()`: those who decode are all who wait."""
    maker = Maker()
    graphs = graphs_of(maker)
    assert graphs.brings(graphs.bucket(3), at_once=False) and not graphs.brings(graphs.bucket(12), at_once=False)
    assert maker.captured == [(4, False), (4, True), (16, False)]
    while graphs.prepare(2):  # from now on somebody does
        pass
    assert maker.captured[3:] == [(1, False), (2, False), (1, True), (2, True)]
    graphs.buckets.pop(16)
    assert not graphs.brings(graphs.bucket(7), at_once=False)


def test_what_is_dropped_is_free_at_once() -> None:
    """VRAM does not wait until Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        runner = on_gpu("qwen3_moe", ON_GPU, slots=eager_cache, uploads=some_uploads).runner
        runner.decode([runner.new_sequence()], [3])
        kept = [weakref.ref(each) for each in (runner.steps, runner.decoder, runner.slots.cache, runner.uploads)]
        del runner
        assert [each() for each in kept] == [None] * 4
    finally:
        gc.enable()


def test_what_was_begun_is_gone_on_with() -> None:
    """A request that comes between the two pieces of a graph waits for the second only."""
    maker = Maker()
    graphs = graphs_of(maker)
    graphs.bucket(1)
    assert graphs.prepare(8)
    assert maker.done[-1] == ("warm", 2, False)
    graphs.bucket(2)
    assert maker.done[2:] == [("warm", 2, False), ("capture", 2, False)]


def test_without_memory_the_rest_waits_until_it_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker(most_with_memory=4)
    graphs = graphs_of(maker)
    with caplog.at_level(logging.WARNING, "moesaic.gpu"):
        while graphs.prepare(32):
            pass
    assert maker.captured == [(1, False), (2, False), (4, False)]
    assert "from 8 sequences on are captured when they come: no memory" in caplog.text
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graphs.bucket(8)
    maker.most_with_memory = 8
    assert graphs.bucket(5).size == 8


def test_without_graphs_there_is_nothing_to_prepare() -> None:
    maker = Maker()
    graphs = graphs_of(maker, captures=False)
    assert not graphs.prepare(32)
    assert [graphs.bucket(count).size for count in (1, 3, 8, 20)] == [1, 4, 8, 32]
    assert graphs.brings(graphs.bucket(3), at_once=False) and not graphs.brings(graphs.bucket(20), at_once=False)
    assert maker.done == []


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"] if ON_GPU else ["qwen3_moe"])
def test_preparing_between_steps_changes_nothing(family: str) -> None:
    """Steps with padding, and launches in their buffers between them: neither counts, nor touches sequences."""
    with_uploads = family != "qwen3_next"
    uploads = {"uploads": some_uploads} if with_uploads else {}
    runner = on_gpu(family, ON_GPU, replace(OPTIONS, max_batch=8), **uploads).runner  # type: ignore[arg-type]
    steps, length = runner.steps, 7 if ON_GPU else 5
    rows = [inputs(1, length, seed=index)[0] for index in range(3)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:3]) for sequence, row in zip(sequences, rows, strict=True)])
    with torch.no_grad():
        expected = checkpoint_of(family)[0](torch.stack(rows)).logits
    steps.graphs.expected = 8
    for position in range(3, length):
        bucket = steps.graphs.bucket(3)
        assert bucket.size == (8 if ON_GPU and position == 3 else 4)
        logits = runner.decode(sequences, [int(row[position]) for row in rows]).cpu()
        assert relative_error(logits, expected[:, position]) < TOLERANCE
        steps.warm_up(bucket, with_uploads)
        while ON_GPU and not (4 in steps.buckets and steps.buckets[4].is_ready):
            assert steps.prepare(8)
    uses = runner.server.uses
    assert int(uses.sum()) == (length - 3) * len(rows) * runner.decoder.top_k * len(uses)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_all_sizes_have_the_numbers_of_their_sequences_on_a_gpu() -> None:
    """Graphs that share their memory, replayed in any order."""
    ours = on_gpu("qwen3_moe", True, replace(OPTIONS, max_batch=32, num_blocks=256), slots=eager_cache)
    runner = ours.runner
    while runner.steps.prepare(32):
        pass
    assert sorted(size for size, bucket in runner.steps.buckets.items() if bucket.is_ready) == [1, 2, 4, 8, 16, 32]
    stock, rows = checkpoint_of("qwen3_moe")[0], [inputs(1, 12, seed=index)[0] for index in range(32)]
    with torch.no_grad():
        expected = stock(torch.stack(rows)).logits
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:3]) for sequence, row in zip(sequences, rows, strict=True)])
    for count in (3, 32, 1, 7, 2, 20, 5):
        at = [sequence.length for sequence in sequences[:count]]
        logits = runner.decode(sequences[:count], [int(rows[i][at[i]]) for i in range(count)]).cpu()
        wanted = torch.stack([expected[i, at[i]] for i in range(count)])
        assert relative_error(logits, wanted) < TOLERANCE
