"""Attention over pages against a float64 oracle, and against itself in other batches, on other threads."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_ops_attention import check

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels import independent_rows
from moesaic.kernels.paged_attention import paged_attention, paged_latent_attention

LENGTHS = [1, 5, 64, 65, 700, 130]
QUERIES = [1, 5, 1, 3, 1, 40]


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has, without tiles."""
    with independent_rows():
        yield each_isa


@pytest.fixture(params=[1, 3])
def num_threads(request):
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield request.param
    _native.set_num_threads(before)


class Batch:
    """Sequences in a pool of blocks in random order; every position that no sequence has is not a number."""

    def __init__(self, lengths, queries, widths, block_size=64, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.queries = lengths, queries
        counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=g)
        self.tables = torch.full((len(lengths), max(counts)), 1 << 30, dtype=torch.int32)
        self.pools = [torch.full((len(order), block_size, *width), torch.nan, dtype=dtype) for width in widths]
        self.states = []  # of each sequence, float64 [length, ...]
        taken = 0
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks = order[taken : taken + count]
            taken += count
            self.tables[index, :count] = blocks.int()
            own = [torch.randn(length, *width, generator=g).to(dtype) for width in widths]
            for pool, states in zip(self.pools, own, strict=True):
                for position in range(0, length, block_size):
                    part = states[position : position + block_size]
                    pool[blocks[position // block_size], : len(part)] = part
            self.states.append([states.double() for states in own])
        self.starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
        self.where = (self.tables, torch.tensor(lengths, dtype=torch.int32), self.starts)

    def attend_in_parts(self, q, most, **options):
        """What queries of every sequence alone, at most so many at a time, attend to."""
        out = torch.empty_like(q)
        for index, (length, count) in enumerate(zip(self.lengths, self.queries, strict=True)):
            for first in range(0, count, most):
                end = min(count, first + most)
                part = slice(int(self.starts[index]) + first, int(self.starts[index]) + end)
                where = (
                    self.tables[index : index + 1],
                    torch.tensor([length - count + end], dtype=torch.int32),
                    torch.tensor([0, end - first], dtype=torch.int32),
                )
                out[part] = paged_attention(q[part], *self.pools, *where, **options)
        return out

    def randn(self, *shape, seed=1):
        return torch.randn(sum(self.queries), *shape, generator=torch.Generator().manual_seed(seed))

    def of(self, x, index):
        return x[self.starts[index] : self.starts[index + 1]]


def oracle(q, keys, values, scale, window=None, sinks=None, softcap=None):
    """The last tokens of one sequence, in float64: q [n, heads, d], keys [length, kv_heads, d] -> [n, heads, value]."""
    count, length, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    last = length - count + torch.arange(count)[:, None]
    position = torch.arange(length)[None]
    see = (position <= last) & (position > last - (window or length))
    scores = scores.masked_fill(~see, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, count, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values)


def check_batch(batch, q, out, tolerance=2e-6, **options):
    for index in range(len(batch.lengths)):
        keys, values = batch.states[index]
        check(batch.of(out, index), oracle(batch.of(q, index), keys, values, **options), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [64, 16, 192])
def test_sequences_of_different_lengths(dtype, block_size, num_threads):
    batch = Batch(LENGTHS, QUERIES, [(2, 80), (2, 72)], block_size, dtype)
    q = batch.randn(6, 80)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.2), scale=0.2)


@pytest.mark.parametrize("window", [1, 40, 64, 300])
def test_windows_sinks_and_softcap(window, num_threads):
    batch = Batch(LENGTHS, QUERIES, [(1, 64), (1, 64)])
    q, sinks = batch.randn(3, 64), torch.randn(3, generator=torch.Generator().manual_seed(2))
    options = {"scale": 0.5, "sinks": sinks, "softcap": 3.0}
    out = paged_attention(q, *batch.pools, *batch.where, sliding_window=window, **options)
    check_batch(batch, q, out, window=window, **options)


@pytest.mark.parametrize("lengths", [[9000], [4099, 33, 9000]])
def test_long_sequences_are_cut_into_segments(lengths, num_threads):
    batch = Batch(lengths, [1] * len(lengths), [(2, 32), (2, 32)])
    q = batch.randn(4, 32)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.3), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents(dtype, num_threads):
    batch = Batch(LENGTHS, QUERIES, [(64 + 16,)], dtype=dtype)
    q_latent, q_rope = batch.randn(70, 64), batch.randn(70, 16, seed=3)
    out = paged_latent_attention(q_latent, q_rope, *batch.pools, *batch.where, scale=0.1)
    q = torch.cat([q_latent, q_rope], -1)
    for index in range(len(LENGTHS)):
        keys = batch.states[index][0][:, None]
        check(batch.of(out, index), oracle(batch.of(q, index), keys, keys[..., :64], 0.1))


def test_two_sequences_share_blocks():
    batch = Batch([200, 130], [1, 2], [(1, 32), (1, 32)])
    batch.tables[1, :2] = batch.tables[0, :2]  # the first 128 positions are the same
    batch.states[1] = [
        torch.cat([first[:128], own[128:]]) for first, own in zip(batch.states[0], batch.states[1], strict=True)
    ]
    q = batch.randn(2, 32)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.3), scale=0.3)


def test_a_sequence_of_padding_gets_zeros():
    batch = Batch([70, 70], [2, 3], [(1, 32), (1, 32)])
    tables, lengths, starts = batch.where
    lengths[1] = 0
    out = paged_attention(batch.randn(2, 32), *batch.pools, tables, lengths, starts, scale=0.3)
    assert (out[2:] == 0).all()
    assert (out[:2] != 0).all()


def test_a_row_does_not_depend_on_the_batch_to_the_bit():
    """Neither on other sequences, nor on threads, nor on how many tokens are computed at once."""
    before = _native.num_threads()
    batch = Batch([5000, 3, 777, 2048, 300], [7, 1, 9, 1, 300], [(2, 64), (2, 64)], dtype=torch.bfloat16)
    q = batch.randn(8, 64)
    results = []
    for threads in (1, 2, 7):
        _native.set_num_threads(threads)
        results.append(paged_attention(q, *batch.pools, *batch.where, scale=0.2, sliding_window=900))
        results.append(batch.attend_in_parts(q, 3, scale=0.2, sliding_window=900))
    _native.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_what_does_not_fit_is_refused():
    batch = Batch([70, 70], [2, 3], [(1, 32), (1, 32)])
    tables, lengths, starts = batch.where
    q = batch.randn(2, 32)
    broken = [
        (torch.full_like(tables, 99), lengths, starts),
        (tables, torch.tensor([70, 200], dtype=torch.int32), starts),
        (tables, torch.tensor([70, 2], dtype=torch.int32), starts),
        (tables, lengths, torch.tensor([0, 2, 4], dtype=torch.int32)),
        (tables, lengths, torch.tensor([0, 6, 5], dtype=torch.int32)),
        (tables[:1], lengths, starts),
        (tables.long(), lengths, starts),
    ]
    for where in broken:
        with pytest.raises(KernelError):
            paged_attention(q, *batch.pools, *where, scale=0.3)
    for size in (48, 100):
        pools = [torch.zeros(3, size, 1, 32), torch.zeros(3, size, 1, 32)]
        with pytest.raises(KernelError, match="blocks of"):
            paged_attention(q, *pools, *batch.where, scale=0.3)
