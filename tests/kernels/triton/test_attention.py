"""Attention over a paged cache against float64 on the same keys in order."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.paged_oracle import DEVICE, Case, attended, error_of, latent_attended

from moesaic.errors import KernelError
from moesaic.kernels.triton import attention_tiles
from moesaic.kernels.triton.attention import (
    attention_parts,
    latent_attention_parts,
    paged_attention,
    paged_latent_attention,
)
from moesaic.kernels.triton.attention_tiles import LatentTiles, Tiles, choose_latent_tiles, choose_tiles
from moesaic.kernels.triton.merge import merge

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def attention_error(case: Case, heads: int, kv_heads: int, dim: int, value_dim: int | None = None, **options):
    dtype, tiles = options.pop("dtype", torch.float32), options.pop("tiles", None)
    q = case.random(case.num_tokens, heads, dim)
    keys, values = case.pool(kv_heads, dim, dtype=dtype), case.pool(kv_heads, value_dim or dim, dtype=dtype)
    actual = paged_attention(
        q, keys, values, *case.step, scale=dim**-0.5, max_query_len=case.max_query_len, tiles=tiles, **options
    )
    expected = attended(case, q, keys, values, dim**-0.5, **options)
    return error_of(actual, expected)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_of_sequences_of_different_lengths(block_size, splits):
    case = Case([(1, 1), (129, 1), (16, 1)], block_size)
    tiles = Tiles(16, 32, 4, 1, splits)
    assert attention_error(case, 4, 2, 64, tiles=tiles) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_from_each_type_of_cache_with_tiles_of_its_own_choice(dtype):
    case = Case([(100, 1), (33, 1)], 16)
    assert attention_error(case, 8, 1, 32, dtype=dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (96, 96), (24, 16), (40, 80)])
def test_head_dimensions_that_are_no_powers_of_two(dim, value_dim):
    case = Case([(20, 1), (9, 5)], 16)
    assert attention_error(case, 4, 2, dim, value_dim) < 2e-6


def test_values_wider_than_what_a_program_merges():
    case = Case([(40, 1), (9, 1)], 16)
    assert attention_error(case, 2, 1, 16, 150, tiles=Tiles(16, 16, 4, 1, 20)) < 2e-6


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_that_continues_a_cache(group, splits):
    case = Case([(11, 11), (40, 7), (17, 1)], 16)
    assert attention_error(case, 2 * group, 2, 32, tiles=Tiles(32, 16, 4, 1, splits)) < 2e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [1, 5, 33])
def test_windows(window, splits):
    case = Case([(80, 1), (3, 1)], 16)
    assert attention_error(case, 2, 1, 32, tiles=Tiles(16, 16, 4, 1, splits), sliding_window=window) < 2e-6
    case = Case([(40, 12), (5, 5)], 16)
    assert attention_error(case, 2, 1, 32, tiles=Tiles(16, 16, 4, 1, splits), sliding_window=window) < 2e-6


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_and_softcap(splits):
    case = Case([(80, 1), (1, 1)], 16)
    sinks = case.random(2) * 3
    tiles = Tiles(16, 16, 4, 1, splits)
    assert attention_error(case, 2, 1, 32, tiles=tiles, sinks=sinks) < 2e-6
    assert attention_error(case, 2, 1, 32, tiles=tiles, softcap=0.5) < 2e-6
    assert attention_error(case, 2, 1, 32, tiles=tiles, sinks=sinks, softcap=2.0, sliding_window=9) < 2e-6


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_padding_gives_zeros(splits, with_sinks):
    case = Case([(40, 1), (0, 1), (0, 1)], 16)
    case.block_tables[1:] = 0
    q = case.random(3, 4, 32)
    keys, values = case.pool(2, 32), case.pool(2, 32)
    keys[0] = values[0] = torch.nan  # memory that nobody has written may hold anything
    keys[case.block_tables[0, 2], 8:] = values[case.block_tables[0, 2], 8:] = torch.nan
    sinks = case.random(4) if with_sinks else None
    out = torch.full((3, 4, 32), torch.nan, device=DEVICE)
    tiles = Tiles(16, 16, 4, 1, splits)
    paged_attention(q, keys, values, *case.step, scale=0.2, max_query_len=1, sinks=sinks, out=out, tiles=tiles)
    assert torch.isfinite(out).all() and torch.count_nonzero(out[1:]) == 0 and torch.count_nonzero(out[0]) > 0


def test_strided_queries_and_output():
    case = Case([(30, 3), (9, 1)], 16)
    wide = case.random(4, 5, 4, 32)
    out = torch.zeros(4, 4, 48, device=DEVICE)
    keys, values = case.pool(2, 32), case.pool(2, 32)
    paged_attention(wide[:, 2], keys, values, *case.step, scale=0.3, max_query_len=3, out=out[..., :32])
    assert error_of(out[..., :32], attended(case, wide[:, 2], keys, values, 0.3)) < 2e-6
    assert torch.count_nonzero(out[..., 32:]) == 0


@pytest.mark.parametrize(
    ("block_size", "splits", "dtype"),
    [(16, 1, torch.float32), (16, 3, torch.float16), (64, 1, torch.bfloat16), (64, 3, torch.float32)],
)
def test_latent_attention_in_decode(block_size, splits, dtype):
    case = Case([(100, 1), (1, 1), (0, 1)], block_size)
    q_latent, q_rope = case.random(3, 18, 64), case.random(3, 18, 16)
    cache = case.pool(None, 80, dtype=dtype)
    tiles = Tiles(16, 32, 4, 1, splits)
    actual = paged_latent_attention(q_latent, q_rope, cache, *case.step, scale=0.1, max_query_len=1, tiles=tiles)
    assert torch.count_nonzero(actual[2]) == 0
    assert error_of(actual, latent_attended(case, q_latent, q_rope, cache, 0.1)) < TOLERANCE[dtype]


def test_latent_attention_in_prefill():
    case = Case([(30, 13), (5, 5), (44, 2)], 16)
    query = case.random(20, 3, 24 + 40 + 16)
    q_latent, q_rope = query[..., 24:64], query[..., 64:]
    cache = case.pool(None, 56)
    actual = paged_latent_attention(q_latent, q_rope, cache, *case.step, scale=0.1, max_query_len=13)
    assert error_of(actual, latent_attended(case, q_latent, q_rope, cache, 0.1)) < 2e-6


@pytest.mark.parametrize("tiles", [None, Tiles(16, 16, 4, 1, 5)])
def test_parts_of_grouped_queries_add_up(tiles):
    case = Case([(90, 1), (9, 3), (0, 1), (1, 1)], 16)
    q, keys, values, sinks = case.random(6, 4, 32), case.pool(2, 32), case.pool(2, 32), case.random(4) * 3
    options = {"scale": 0.2, "max_query_len": 3, "sliding_window": 40}
    parts = attention_parts(q, keys, values, *case.step, **options, tiles=tiles)
    expected = attended(case, q, keys, values, 0.2, sliding_window=40, sinks=sinks)
    assert error_of(merge(parts, sinks), expected) < 2e-6


@pytest.mark.parametrize("few", [0, 32, 33, 100, 101])
@pytest.mark.parametrize(("heads", "splits", "latent", "rope"), [(9, 8, 64, 16), (40, 4, 48, 24)])
def test_latent_attention_of_short_and_long_sequences_in_a_launch(heads, splits, latent, rope, few):
    case = Case([(101, 1), (33, 2), (0, 1), (1, 1), (32, 1)], 32)
    q_latent, q_rope, cache = case.random(6, heads, latent), case.random(6, heads, rope), case.pool(None, latent + rope)
    tiles = LatentTiles(64, 16, 4, 2, splits, 16, few)
    parts = latent_attention_parts(q_latent, q_rope, cache, *case.step, scale=0.1, max_query_len=2, tiles=tiles)
    assert error_of(merge(parts), latent_attended(case, q_latent, q_rope, cache, 0.1)) < 2e-6
    if few == 100:  # the others have a share each at least, and no more than there are programs for few rows
        assert bool((parts.logs[splits // 4 :, 1:] == -torch.inf).all()) and bool(parts.logs[:, 0].isfinite().any())


def test_tiles_of_latent_attention_of_few_tokens(monkeypatch):
    device, dims = torch.device("cpu"), (512, 64)
    assert choose_latent_tiles(128, 128, 1, 4096, dims, torch.bfloat16, device) is None  # not on such a card
    monkeypatch.setattr(attention_tiles, "_device_limits", lambda device: (132, 227 << 10))
    tiles = choose_latent_tiles(128, 128, 1, 65536, dims, torch.bfloat16, device)
    assert (tiles.splits, tiles.few) == (64, 16 * 6 * 64)
    tiles = choose_latent_tiles(128, 128, 3, 65536, dims, torch.bfloat16, device)
    assert (tiles.splits, tiles.few) == (20, 5 * 6 * 64)
    assert choose_latent_tiles(128, 8 * 128, 8, 65536, dims, torch.bfloat16, device).splits == 4
    assert choose_latent_tiles(128, 128, 1, 100, dims, torch.bfloat16, device).splits == 8
    assert choose_latent_tiles(128, 128, 1, 65536, dims, torch.float32, device) is None
    assert choose_latent_tiles(16, 16, 1, 65536, dims, torch.bfloat16, device) is None
    assert choose_latent_tiles(128, 128, 1, 65536, (1024, 64), torch.bfloat16, device) is None


def test_keys_in_two_parts_with_values_of_their_own():
    case = Case([(30, 13), (5, 5), (44, 2)], 16)
    query = case.random(20, 4, 24 + 40)
    keys, values = case.pool(2, 64), case.pool(2, 48)
    out = torch.zeros(20, 6, 48, device=DEVICE)
    paged_attention(
        query[..., :24], keys, values, *case.step, scale=0.1, max_query_len=13, q_rope=query[..., 24:], out=out[:, 1:5]
    )
    assert error_of(out[:, 1:5], attended(case, query, keys, values, 0.1)) < 2e-6
    assert torch.count_nonzero(out[:, [0, 5]]) == 0


def test_the_tiles_chosen_fit_and_fill():
    device = torch.device("cpu")
    decode = choose_tiles(8, 4, 4096, (128, 0, 128), torch.bfloat16, device)
    assert decode.rows == 16 and decode.splits == 2  # two programs for each of 4 processors
    assert choose_tiles(8, 1, 4096, (128, 0, 128), torch.bfloat16, device).splits == 8
    assert choose_tiles(8, 1, 60, (128, 0, 128), torch.bfloat16, device).splits == 1
    assert choose_tiles(8, 64, 4096, (128, 0, 128), torch.bfloat16, device).splits == 1
    latent = choose_tiles(128, 1, 4096, (512, 64, 512), torch.bfloat16, device, True)
    assert (16 + (latent.stages - 1) * latent.keys) * 576 * 2 <= 99 * 1024
    assert choose_tiles(2048 * 8, 4, 4096, (128, 0, 128), torch.bfloat16, device).splits == 1


def test_wrong_arguments_are_refused():
    case = Case([(20, 1)], 16)
    q, keys, values = case.random(1, 4, 32), case.pool(2, 32), case.pool(2, 32)
    tables, lens, starts = case.step

    def call(q=q, keys=keys, values=values, tables=tables, lens=lens, starts=starts, **options):
        return paged_attention(q, keys, values, tables, lens, starts, scale=1.0, max_query_len=1, **options)

    bad = [
        ("q is", lambda: call(q=q.half())),
        ("q is", lambda: call(q=q[..., :16])),
        ("q has 3 heads", lambda: call(q=q[:, :3])),
        ("keys is", lambda: call(keys=keys.double())),
        ("values has shape", lambda: call(values=values[:, :8])),
        ("one type", lambda: call(values=values.half())),
        ("seq_lens is", lambda: call(lens=lens.long())),
        ("query_start is", lambda: call(starts=starts[:1])),
        ("sliding_window is", lambda: call(sliding_window=0)),
        ("sinks is", lambda: call(sinks=q[0, :3, 0])),
        ("out is", lambda: call(out=q[:, :2])),
    ]
    for message, attempt in bad:
        with pytest.raises(KernelError, match=message):
            attempt()
    with pytest.raises(KernelError, match="cache is"):
        paged_latent_attention(q, q, case.pool(None, 32), *case.step, scale=1.0, max_query_len=1)
