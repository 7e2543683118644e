"""Attention of parts of prompts on bfloat16 caches, which goes by tiles where there are any, against a float64 oracle.

On instruction sets without tiles the same tests look at the path that everything else takes.
"""

from __future__ import annotations

import pytest
import torch
from tests.kernels import test_ops_attention as dense
from tests.kernels.test_paged_attention import Batch, oracle

from moesaic import _native
from moesaic.kernels import independent_rows, ops
from moesaic.kernels.paged_attention import paged_attention, paged_latent_attention

# Of the largest value. Queries and weights are rounded to bfloat16, by up to 2^-9 of each.
TOLERANCE = 1e-2
# Root of the mean square of errors, beside that of the values: rounding has no bias, so that errors of keys cancel.
MEAN_TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


@pytest.fixture(params=[1, 3])
def num_threads(request):
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield request.param
    _native.set_num_threads(before)


def check(actual, expected):
    dense.check(actual, expected, TOLERANCE)
    error = (actual.double() - expected).square().mean().sqrt()
    assert error <= MEAN_TOLERANCE * expected.square().mean().sqrt()


def check_batch(batch, q, out, **options):
    for index in range(len(batch.lengths)):
        check(batch.of(out, index), oracle(batch.of(q, index), *batch.states[index], **options))


# Parts that go by tiles beside a short one and a decoding sequence; odd numbers of tokens and positions.
LENGTHS = [65, 700, 333, 70]
QUERIES = [65, 1, 77, 3]


@pytest.mark.parametrize("widths", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (72, 40)], ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_widths_and_groups(widths, group, num_threads):
    batch = Batch(LENGTHS, QUERIES, [(2, width) for width in widths], dtype=torch.bfloat16)
    q = batch.randn(2 * group, widths[0])
    scale = widths[0] ** -0.5
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=scale), scale=scale)


@pytest.mark.parametrize("num_tokens", [8, 15, 16, 17, 33, 256])
@pytest.mark.parametrize("length", [256, 257, 287, 513])
def test_odd_tails(num_tokens, length):
    batch = Batch([length], [num_tokens], [(1, 64), (1, 64)], dtype=torch.bfloat16)
    q = batch.randn(5, 64)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.125), scale=0.125)


@pytest.mark.parametrize("block_size", [16, 192])
def test_blocks_of_other_sizes(block_size):
    batch = Batch(LENGTHS, QUERIES, [(2, 64), (2, 64)], block_size, torch.bfloat16)
    q = batch.randn(6, 64)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.125), scale=0.125)


@pytest.mark.parametrize("window", [1, 40, 64, 300])
def test_windows_sinks_and_softcap(window, num_threads):
    batch = Batch([900, 333], [600, 77], [(1, 64), (1, 64)], dtype=torch.bfloat16)
    q, sinks = batch.randn(3, 64), torch.randn(3, generator=torch.Generator().manual_seed(2))
    options = {"scale": 0.2, "sinks": sinks, "softcap": 3.0}
    out = paged_attention(q, *batch.pools, *batch.where, sliding_window=window, **options)
    check_batch(batch, q, out, window=window, **options)


@pytest.mark.parametrize("heads", [16, 20])
def test_latents(heads, num_threads):
    batch = Batch([333, 40, 600], [9, 17, 1], [(512 + 64,)], dtype=torch.bfloat16)
    q_latent, q_rope = batch.randn(heads, 512), batch.randn(heads, 64, seed=3)
    out = paged_latent_attention(q_latent, q_rope, *batch.pools, *batch.where, scale=0.06)
    q = torch.cat([q_latent, q_rope], -1)
    for index in range(3):
        keys = batch.states[index][0][:, None]
        check(batch.of(out, index), oracle(batch.of(q, index), keys, keys[..., :512], 0.06))


def test_long_sequences(num_threads):
    batch = Batch([9000, 4099], [33, 9], [(2, 32), (2, 32)], dtype=torch.bfloat16)
    q = batch.randn(8, 32)
    check_batch(batch, q, paged_attention(q, *batch.pools, *batch.where, scale=0.3), scale=0.3)


def test_large_scores_and_rows_that_differ_in_them():
    batch = Batch([300], [40], [(1, 64), (1, 64)], dtype=torch.bfloat16)
    q = (batch.randn(4, 64) * torch.logspace(-3, 2, 40)[:, None, None]).bfloat16().float()
    out = paged_attention(q, *batch.pools, *batch.where, scale=1.0)  # nothing to round in q
    check_batch(batch, q, out, scale=1.0)


@pytest.mark.parametrize("causal_offset", [None, 140, -3])
def test_dense(causal_offset, num_threads):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 6, 70, 80), torch.randn(2, 2, 3, 210, 80).bfloat16()
    k, v = k[:, :, :], v[..., :72]
    out = ops.attention(q, k, v, scale=0.11, causal_offset=causal_offset)
    see = dense.visible(2, 70, 210, causal_offset)
    check(out, dense.oracle(q, k, v, 0.11, see))


def test_dense_latents(num_threads):
    torch.manual_seed(0)
    q_latent, q_rope = torch.randn(1, 16, 40, 128), torch.randn(1, 16, 40, 64)
    latents, rope = torch.randn(1, 300, 128).bfloat16(), torch.randn(1, 300, 64).bfloat16()
    out = ops.mla_attention(q_latent, q_rope, latents, rope, scale=0.07, causal_offset=260)
    q, k = torch.cat([q_latent, q_rope], -1), torch.cat([latents, rope], -1)[:, None]
    see = dense.visible(1, 40, 300, 260)
    expected = dense.oracle(q, k, latents[:, None], 0.07, see)
    check(out, expected if out.shape == expected.shape else expected.transpose(1, 2))


def test_a_row_depends_neither_on_others_nor_on_threads_nor_on_where_a_prompt_is_cut():
    """As without tiles, as long as parts are large enough for them."""
    before = _native.num_threads()
    batch = Batch([5000, 700, 2100], [60, 1, 300], [(2, 64), (2, 64)], dtype=torch.bfloat16)
    q = batch.randn(8, 64)
    results = []
    for threads in (1, 2, 7):
        _native.set_num_threads(threads)
        results.append(paged_attention(q, *batch.pools, *batch.where, scale=0.2, sliding_window=3000))
        results.append(batch.attend_in_parts(q, 20, scale=0.2, sliding_window=3000))
    _native.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_single_tokens_never_go_by_tiles():
    batch = Batch([700, 65, 300], [1, 1, 1], [(576,)], dtype=torch.bfloat16)
    q_latent, q_rope = batch.randn(128, 512), batch.randn(128, 64, seed=3)
    out = paged_latent_attention(q_latent, q_rope, *batch.pools, *batch.where, scale=0.06)
    with independent_rows():
        again = paged_latent_attention(q_latent, q_rope, *batch.pools, *batch.where, scale=0.06)
    assert torch.equal(out, again)


def test_a_row_that_is_not_a_number_stays_alone():
    batch = Batch([300], [40], [(1, 64), (1, 64)], dtype=torch.bfloat16)
    q = batch.randn(4, 64)
    expected = paged_attention(q, *batch.pools, *batch.where, scale=0.125)
    q[7, 2] = torch.nan
    out = paged_attention(q, *batch.pools, *batch.where, scale=0.125)
    assert out[7, 2].isnan().all()
    out[7, 2] = expected[7, 2]
    assert torch.equal(out, expected)
