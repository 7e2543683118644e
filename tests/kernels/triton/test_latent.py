"""What surrounds latent attention of few tokens, and merging, against float64 and the kernels for many tokens."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.orders import in_order, numbers
from tests.kernels.triton.paged_oracle import error_of

from moesaic.errors import KernelError
from moesaic.kernels import ops
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.formats import device_format
from moesaic.kernels.triton.latent import absorb_and_append, latent_values
from moesaic.kernels.triton.merge import Parts, fits_lanes, merge
from moesaic.kernels.triton.rotary import RotaryTable, latent_rotate_append
from moesaic.quant import get_format

LOG2 = 0.6931471805599453
FORMS = ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q2_K", "F32", "BF16", "IQ1_S"]
"""All orders of activations: interleaved or not, with none, one, two and four sums of an item."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def form_of(name, cols):
    return device_format(get_format(name), cols)


def same_lanes(actual: Lanes, rows: torch.Tensor, form) -> bool:
    """Whether lanes are those of rows, sums but for rounding; padding included, tokens that there are not excluded."""
    expected = in_order(rows, form)
    assert (actual.num_tokens, actual.cols, actual.order) == (expected.num_tokens, expected.cols, expected.order)
    assert actual.thirds == expected.thirds and actual.values.shape == expected.values.shape
    found, wanted = (numbers(each, form) for each in (actual, expected))
    return bool(torch.allclose(found, wanted, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "heads", "nope", "latent"), [(1, 3, 24, 48), (3, 20, 32, 128), (8, 2, 128, 200), (5, 1, 16, 16)]
)
def test_absorbed_queries(tokens, heads, nope, latent, dtype):
    rope, block_size = 16, 16
    wide = random(tokens, heads, nope + rope + 8)
    query, compressed, weight = wide[..., : nope + rope], random(tokens, latent + rope), random(heads, nope, latent)
    weight, norm_weight = weight.to(dtype), random(latent)
    angles = torch.rand(10, rope // 2, device=DEVICE) * 6
    table = RotaryTable(angles.cos(), angles.sin())
    positions, slots = torch.arange(tokens, device=DEVICE) + 1, torch.arange(tokens, device=DEVICE) * 5 + 2
    slots[tokens // 2] = -1
    options = {"layout": "interleaved"}
    caches = [torch.full((3, block_size, latent + rope), 7.0, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    arguments = (table, positions, caches[0], slots, norm_weight, 1e-5)
    q_latent, q_rope = absorb_and_append(query, compressed, weight, *arguments, **options)
    assert error_of(q_latent, torch.einsum("thn,hnl->thl", query[..., :nope].double(), weight.double())) < 1e-6
    arguments = (table, positions, caches[1], slots, norm_weight, 1e-5)
    expected = latent_rotate_append(compressed, query[..., nope:], *arguments, **options)
    assert torch.equal(q_rope, expected) and torch.equal(*caches)
    assert bool((caches[0] != 7.0).any()) == (tokens > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads", "latent", "value"), [(1, 3, 48, 40), (6, 2, 64, 160), (8, 5, 16, 16)])
def test_values(tokens, heads, latent, value, dtype):
    x, weight = random(tokens, heads, latent), random(heads, latent, value).to(dtype)
    assert error_of(latent_values(x, weight), torch.einsum("thl,hlv->thv", x.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(3, 32, 128)])
def test_values_in_the_order_of_the_next_product(name, tokens, heads, dim):
    form = form_of(name, heads * dim)
    x, weight = random(tokens, heads, 16), random(heads, 16, dim, dtype=torch.bfloat16)
    assert fits_lanes(form, tokens, heads, dim)
    assert same_lanes(latent_values(x, weight, form=form), latent_values(x, weight).flatten(1), form)


def parts_of(splits, tokens, heads, dim, seen):
    """Shares of which all but the first `seen` of each token have seen nothing, and hold nothing."""
    parts = Parts(random(splits, tokens, heads, dim), random(splits, tokens, heads) * 3)
    for token, count in enumerate(seen):
        parts.logs[count:, token] = -torch.inf
        parts.sums[count:, token] = torch.nan
    return parts


def merged(parts, sinks=None):
    """float64 `[tokens, heads, dim]`."""
    logs = parts.logs.double()
    if sinks is not None:
        logs = torch.cat([logs, (sinks.double() / LOG2).expand(1, *logs.shape[1:])])
    weights = torch.softmax(logs * LOG2, 0).nan_to_num(0.0)[: len(parts.logs)]
    return torch.einsum("sth,sthd->thd", weights, parts.sums.double().nan_to_num(0.0))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("splits", "seen"), [(1, [1, 0]), (2, [1, 2]), (19, [3, 19]), (64, [50, 64])])
@pytest.mark.parametrize("dim", [40, 128, 200])
def test_shares_are_added_up(splits, seen, dim, with_sinks):
    parts, sinks = parts_of(splits, 2, 3, dim, seen), random(3) if with_sinks else None
    parts.logs[0, 1] = -torch.inf  # a window can begin behind the first share
    parts.sums[0, 1] = torch.nan
    assert error_of(merge(parts, sinks), merged(parts, sinks)) < 1e-6


def test_shares_are_added_up_into_memory_of_the_caller():
    parts, out = parts_of(3, 2, 3, 32, [3, 2]), torch.zeros(2, 5, 48, device=DEVICE)
    merge(parts, out=out[:, 1:4, 8:40])
    assert error_of(out[:, 1:4, 8:40], merged(parts)) < 1e-6
    out[:, 1:4, 8:40] = 0
    assert torch.count_nonzero(out) == 0


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(2, 16, 256), (4, 8, 128)])
def test_shares_are_added_up_in_the_order_of_the_next_product(name, tokens, heads, dim):
    form, parts = form_of(name, heads * dim), parts_of(4, tokens, heads, dim, [4] * tokens)
    assert same_lanes(merge(parts, form=form), merge(parts).flatten(1), form)


def test_what_does_not_fit_into_lanes():
    assert fits_lanes(form_of("Q4_K", 4096), 8, 32, 128) and not fits_lanes(form_of("Q4_K", 4096), 9, 32, 128)
    assert not fits_lanes(None, 1, 32, 128) and not fits_lanes(form_of("Q4_K", 4096), 0, 32, 128)
    assert fits_lanes(form_of("Q4_K", 4096), 1, 64, 64) and not fits_lanes(form_of("Q4_K", 4096), 1, 128, 32)
    assert fits_lanes(form_of("Q6_K", 4096), 1, 128, 32)  # has no sums
    assert fits_lanes(form_of("Q2_K", 4096), 1, 32, 128) and not fits_lanes(form_of("Q2_K", 4096), 1, 64, 64)
    assert not fits_lanes(form_of("Q8_0", 352), 1, 11, 32)  # rows are padded to more than 11 items
    assert not fits_lanes(form_of("F32", 1000), 1, 10, 100)
    with pytest.raises(KernelError, match="do not fit into the order of Q8_0"):
        merge(parts_of(2, 1, 11, 32, [2]), form=form_of("Q8_0", 352))
    with pytest.raises(KernelError, match="do not fit into the order of Q4_K"):
        latent_values(random(1, 128, 16), random(128, 16, 32), form=form_of("Q4_K", 4096))


def test_no_tokens():
    assert latent_values(random(0, 2, 16), random(2, 16, 16)).shape == (0, 2, 16)
    assert merge(Parts.empty(3, 0, 2, 16, torch.device(DEVICE))).shape == (0, 2, 16)


def test_wrong_arguments_are_refused():
    x, weight = random(2, 3, 16), random(3, 16, 32)
    nothing, table = torch.zeros(2, dtype=torch.int64, device=DEVICE), RotaryTable(random(4, 8), random(4, 8))
    rest = (table, nothing, torch.zeros(1, 4, 48, device=DEVICE), nothing, random(32), 1e-6)
    nine = torch.zeros(9, dtype=torch.int64, device=DEVICE)

    def absorb(query=None, weight=weight, rest=rest, compressed=None):
        query = random(2, 3, 32) if query is None else query
        return absorb_and_append(query, random(2, 48) if compressed is None else compressed, weight, *rest)

    bad = [
        ("x is", lambda: latent_values(x.double(), weight)),
        ("x is", lambda: latent_values(x[..., :8], weight)),
        ("weight is", lambda: latent_values(x, weight[:2])),
        ("weight is", lambda: latent_values(x, weight.double())),
        ("9 tokens", lambda: latent_values(random(9, 3, 16), weight)),
        ("weight is", lambda: absorb(weight=random(3, 8, 32))),
        ("32 numbers of a latent", lambda: absorb(weight=random(3, 16, 24))),
        ("compressed is", lambda: absorb(compressed=random(2, 48).double())),
        ("q_rope is", lambda: absorb(query=random(2, 3, 32).double())),
        (
            "9 tokens",
            lambda: absorb(random(9, 3, 32), rest=(table, nine, rest[2], nine, *rest[4:]), compressed=random(9, 48)),
        ),
        ("out has shape", lambda: merge(parts_of(2, 1, 2, 16, [2]), out=x)),
        ("out is", lambda: merge(parts_of(2, 2, 3, 16, [2, 2]), out=x.double())),
        ("65 shares", lambda: merge(parts_of(65, 1, 2, 16, [2]))),
    ]
    for message, attempt in bad:
        with pytest.raises(KernelError, match=message):
            attempt()
    with pytest.raises(KernelError, match="layout is"):
        absorb_and_append(random(2, 3, 32), random(2, 48), weight, *rest, layout="quarter")
    assert set(ops.ROPE_LAYOUTS) >= {"half", "interleaved"}
