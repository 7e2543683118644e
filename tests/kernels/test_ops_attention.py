"""Attention against a float64 oracle, over instruction sets, shapes, masks and cache types."""

from __future__ import annotations

import itertools

import pytest
import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels import independent_rows, ops

TOLERANCE = 2e-6  # of the largest value: float32 sums in another order


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


def visible(batch, num_queries, num_keys, causal_offset=None, window=None):
    """Bool [batch, 1, num_queries, num_keys] of the causal and windowed mask, written position by position."""
    if causal_offset is None:
        return torch.ones(batch, 1, num_queries, num_keys, dtype=torch.bool)
    offsets = torch.as_tensor(causal_offset).expand(batch)
    last = offsets[:, None, None, None] + torch.arange(num_queries)[None, None, :, None]
    keys = torch.arange(num_keys)[None, None, None, :]
    return (keys <= last) & (keys > last - (window or num_keys + abs(int(offsets.max())) + num_queries))


def oracle(q, k, v, scale, see, mask=None, sinks=None, softcap=None):
    """Attention in float64, one softmax over everything; [batch, num_queries, heads, value_dim]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        see = see & mask[..., : k.shape[2]]
    elif mask is not None:
        scores = scores + mask[..., : k.shape[2]].double()
    scores = scores.masked_fill(~see, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : k.shape[2]]
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


def make(batch, heads, kv_heads, num_queries, num_keys, key_dim, value_dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    # Queries are strided as a projection gives them.
    q = torch.randn(batch, num_queries, heads, key_dim, generator=g).transpose(1, 2)
    k = torch.randn(batch, kv_heads, num_keys, key_dim, generator=g).to(dtype)
    v = torch.randn(batch, kv_heads, num_keys, value_dim, generator=g).to(dtype)
    return q, k, v


def check(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item())


SHAPES = [
    # batch, heads, kv_heads, num_queries, num_keys, key_dim, value_dim
    (1, 1, 1, 1, 1, 64, 64),
    (1, 8, 1, 1, 300, 128, 128),
    (2, 4, 2, 3, 65, 80, 80),
    (1, 6, 2, 40, 40, 96, 96),
    (2, 12, 1, 7, 129, 64, 64),
    (1, 2, 2, 5, 200, 192, 128),
    (1, 4, 4, 2, 63, 256, 256),
    (3, 3, 3, 4, 17, 5, 3),
    (1, 5, 1, 33, 70, 24, 40),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(shape, causal):
    batch, _, _, num_queries, num_keys, key_dim, _ = shape
    q, k, v = make(*shape)
    offset = max(num_keys - num_queries, 0) if causal else None
    actual = ops.attention(q, k, v, scale=key_dim**-0.5, causal_offset=offset)
    check(actual, oracle(q, k, v, key_dim**-0.5, visible(batch, num_queries, num_keys, offset)))


@pytest.mark.parametrize("num_queries", [1, 2, 8, 13, 40])
def test_long_keys_are_split_over_threads(num_queries, num_threads):
    q, k, v = make(1, 4, 2, num_queries, 2100, 64, 64)
    offset = 2100 - num_queries
    actual = ops.attention(q, k, v, scale=0.3, causal_offset=offset)
    check(actual, oracle(q, k, v, 0.3, visible(1, num_queries, 2100, offset)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 128), (80, 72), (7, 9)])
def test_half_caches(dtype, dims):
    q, k, v = make(2, 4, 2, 3, 150, *dims, dtype=dtype)
    scale = dims[0] ** -0.5
    check(ops.attention(q, k, v, scale=scale), oracle(q, k, v, scale, visible(2, 3, 150)))


@pytest.mark.parametrize(("num_queries", "window"), list(itertools.product([1, 5, 70], [1, 16, 64, 100])))
def test_sliding_window(num_queries, window):
    q, k, v = make(2, 4, 2, num_queries, 200, 64, 64)
    offset = torch.tensor([200 - num_queries, 150 - num_queries])
    actual = ops.attention(q, k, v, scale=0.1, causal_offset=offset, sliding_window=window)
    check(actual, oracle(q, k, v, 0.1, visible(2, num_queries, 200, offset, window)))


@pytest.mark.parametrize("num_queries", [1, 6])
def test_sinks_and_softcap(num_queries, num_threads):
    q, k, v = make(2, 8, 2, num_queries, 700, 64, 64)
    sinks = torch.linspace(-3, 9, 8)
    actual = ops.attention(q, k, v, scale=2.0, causal_offset=650, sinks=sinks, softcap=15.0)
    check(actual, oracle(q, k, v, 2.0, visible(2, num_queries, 700, 650), sinks=sinks, softcap=15.0), 1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 6), (1, 6)])
@pytest.mark.parametrize("extra_keys", [0, 3])
def test_boolean_mask_broadcasts(shape, extra_keys):
    q, k, v = make(2, 6, 2, 9, 130, 32, 32)
    mask = torch.rand(*shape, 9, 130 + extra_keys, generator=torch.Generator().manual_seed(1)) < 0.5
    actual = ops.attention(q, k, v, scale=0.4, mask=mask, causal_offset=121)
    check(actual, oracle(q, k, v, 0.4, visible(2, 9, 130, 121), mask=mask))


def test_boolean_mask_that_hides_whole_blocks():
    q, k, v = make(2, 4, 2, 3, 400, 32, 32)
    mask = torch.zeros(2, 1, 3, 400, dtype=torch.bool)
    mask[0, :, :, 130:140] = True
    mask[1, :, 1, 390] = True
    actual = ops.attention(q, k, v, scale=0.4, mask=mask)
    check(actual, oracle(q, k, v, 0.4, visible(2, 3, 400), mask=mask))


def test_rows_that_see_nothing_are_zero(num_threads):
    q, k, v = make(2, 4, 2, 3, 600, 32, 32)
    mask = torch.ones(2, 1, 3, 600, dtype=torch.bool)
    mask[1, :, 1] = False
    actual = ops.attention(q, k, v, scale=0.4, mask=mask)
    check(actual, oracle(q, k, v, 0.4, visible(2, 3, 600), mask=mask))
    assert torch.count_nonzero(actual[1, 1]) == 0
    assert torch.count_nonzero(ops.attention(q, k, v, scale=0.4, causal_offset=-3)) == 0
    assert torch.count_nonzero(ops.attention(q, k[:, :, :0], v[:, :, :0], scale=0.4)) == 0


def test_additive_mask_as_transformers_makes_it():
    q, k, v = make(2, 4, 2, 20, 90, 32, 32)
    mask = torch.zeros(2, 1, 20, 90)
    mask[0, :, :, 60:] = torch.finfo(torch.float32).min
    mask[1, :, :, ::7] = -torch.inf
    mask[1, :, 3] = torch.finfo(torch.float32).min  # a row that sees nothing: the mean of all, as in eager attention
    actual = ops.attention(q, k, v, scale=0.4, mask=mask)
    expected = oracle(q, k, v, 0.4, visible(2, 20, 90), mask=mask)
    expected[1, 3] = v[1].double().mean(1).repeat_interleave(2, 0)
    check(actual, expected)


def test_strided_caches_and_output():
    cache = torch.randn(2, 500, 3, 2, 64)  # [batch, tokens, ., kv_heads, dim]
    k, v = cache[:, 10:90, 0].transpose(1, 2), cache[:, 10:90, 2].transpose(1, 2)
    q = torch.randn(2, 4, 5, 64)
    buffer = torch.full((2, 5, 4, 100), 7.0)
    ops.attention(q, k, v, scale=0.1, out=buffer[..., 20:84])
    check(buffer[..., 20:84], oracle(q, k, v, 0.1, visible(2, 5, 80)))
    assert (buffer[..., :20] == 7.0).all() and (buffer[..., 84:] == 7.0).all()


def test_large_scores_do_not_overflow():
    q, k, v = make(1, 2, 2, 4, 300, 64, 64)
    check(ops.attention(q * 100, k * 100, v, scale=1.0), oracle(q * 100, k * 100, v, 1.0, visible(1, 4, 300)), 1e-2)


def test_nan_stays_in_its_row(num_threads):
    q, k, v = make(1, 4, 2, 3, 700, 32, 32)
    q[0, 1, 2, 5] = torch.nan
    actual = ops.attention(q, k, v, scale=1.0)
    assert torch.isnan(actual[0, 2, 1]).all()
    assert torch.isnan(actual).sum() == 32


MLA_SHAPES = [
    # batch, heads, num_queries, num_keys, latent, rope
    (1, 128, 1, 300, 512, 64),
    (1, 16, 3, 1100, 512, 64),
    (2, 5, 7, 70, 48, 10),
    (1, 70, 2, 33, 32, 16),
]


@pytest.mark.parametrize("shape", MLA_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mla(shape, dtype, num_threads):
    batch, heads, num_queries, num_keys, latent_dim, rope_dim = shape
    g = torch.Generator().manual_seed(3)
    q_latent = torch.randn(batch, heads, num_queries, latent_dim, generator=g)
    q_rope = torch.randn(batch, num_queries, heads, rope_dim, generator=g).transpose(1, 2)
    latent = torch.randn(batch, num_keys, latent_dim, generator=g).to(dtype)
    rope = torch.randn(batch, num_keys, rope_dim, generator=g).to(dtype)
    offset = num_keys - num_queries
    scale = (latent_dim + rope_dim) ** -0.5
    actual = ops.mla_attention(q_latent, q_rope, latent, rope, scale=scale, causal_offset=offset)
    keys = torch.cat([latent, rope], dim=-1).unsqueeze(1)
    queries = torch.cat([q_latent, q_rope], dim=-1)
    see = visible(batch, num_queries, num_keys, offset)
    expected = oracle(queries, keys, latent.unsqueeze(1), scale, see)
    check(actual, expected.transpose(1, 2))


def test_mla_mask_window_and_sinks():
    g = torch.Generator().manual_seed(4)
    q_latent, q_rope = torch.randn(2, 6, 4, 64, generator=g), torch.randn(2, 6, 4, 16, generator=g)
    latent, rope = torch.randn(2, 90, 64, generator=g), torch.randn(2, 90, 16, generator=g)
    mask = torch.rand(2, 1, 4, 90, generator=g) < 0.7
    sinks = torch.linspace(-1, 2, 6)
    options = {"scale": 0.2, "mask": mask, "sinks": sinks}
    actual = ops.mla_attention(q_latent, q_rope, latent, rope, causal_offset=80, sliding_window=30, **options)
    keys, queries = torch.cat([latent, rope], -1).unsqueeze(1), torch.cat([q_latent, q_rope], -1)
    expected = oracle(queries, keys, latent.unsqueeze(1), 0.2, visible(2, 4, 90, 80, 30), mask=mask, sinks=sinks)
    check(actual, expected.transpose(1, 2))


def test_wrong_arguments_are_refused():
    q, k, v = make(1, 4, 2, 3, 20, 32, 32)
    bad = [
        ("q is", lambda: ops.attention(q.double(), k, v, scale=1.0)),
        ("k is", lambda: ops.attention(q, k[..., :16], v, scale=1.0)),
        ("v is", lambda: ops.attention(q, k, v[:, :, :10], scale=1.0)),
        ("v is", lambda: ops.attention(q, k, v.bfloat16(), scale=1.0)),
        ("v is", lambda: ops.attention(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), scale=1.0)),
        ("heads", lambda: ops.attention(q[:, :3], k, v, scale=1.0)),
        ("sliding_window", lambda: ops.attention(q, k, v, scale=1.0, sliding_window=4)),
        ("sinks", lambda: ops.attention(q, k, v, scale=1.0, sinks=torch.zeros(3))),
        ("mask", lambda: ops.attention(q, k, v, scale=1.0, mask=torch.ones(1, 1, 3, 19, dtype=torch.bool))),
        ("mask", lambda: ops.attention(q, k, v, scale=1.0, mask=torch.ones(1, 3, 3, 20, dtype=torch.bool))),
        ("mask", lambda: ops.attention(q, k, v, scale=1.0, mask=torch.ones(1, 1, 3, 20, dtype=torch.int64))),
        ("causal_offset", lambda: ops.attention(q, k, v, scale=1.0, causal_offset=torch.tensor([1, 2]))),
        ("out", lambda: ops.attention(q, k, v, scale=1.0, out=torch.empty(1, 4, 3, 32))),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
