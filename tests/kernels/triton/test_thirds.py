"""Activations as tensor cores read them: three bfloat16 that hold all bits, sums, and their places by a definition."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.orders import numbers

from moesaic.kernels.triton.activations import to_lanes, to_thirds
from moesaic.kernels.triton.formats import device_format, supported_formats
from moesaic.kernels.triton.formats.description import DeviceFormat
from moesaic.kernels.triton.thirds import third_place
from moesaic.quant import FORMATS

COLS, TOKENS = 512, 3
BY_THIRDS = [name for name in supported_formats() if device_format(FORMATS[name], COLS).has_thirds]


def place(form: DeviceFormat, p: int, step: int, c: int) -> tuple[int, int, int]:
    """Of a weight of an item: plane, fourth, place in the fourth."""
    pair, half = (c // 4 * 2 + c % 2, c // 2 % 2) if form.width > 2 else (0, c)
    return p, step % 4, (pair * (form.steps // 4) + step // 4) * 2 + half


@triton.jit
def places_kernel(thirds, out, F: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    k = tl.arange(0, COLS)
    tl.store(out + k, tl.load(thirds + third_place(k, F, TOKENS)).to(tl.float32))


@pytest.mark.parametrize("fmt", BY_THIRDS)
def test_single_columns_lie_where_whole_rows_have_them(fmt):
    form = device_format(FORMATS[fmt], COLS)
    x = torch.arange(COLS, dtype=torch.float32, device=DEVICE) // 2  # bfloat16 has all of each
    out = torch.empty(COLS, device=DEVICE)
    places_kernel[(1,)](to_thirds(x[None], form).values.view(torch.bfloat16), out, form, 8, COLS)
    assert torch.equal(out * 2.0**-80, x)


@pytest.mark.parametrize("fmt", BY_THIRDS)
def test_thirds_are_all_of_it(fmt):
    form = device_format(FORMATS[fmt], COLS)
    x = torch.randn(TOKENS, COLS)
    thirds = to_thirds(x.to(DEVICE), form, 32)
    assert (thirds.num_tokens, thirds.thirds, thirds.order) == (TOKENS, 8, form.thirds_order)
    size, sums = form.steps * form.width, form.third_sums
    values = thirds.values[: form.num_items(COLS)].cpu()
    parts = values[:, : form.item * 12].contiguous().view(torch.bfloat16)
    parts = parts.view(-1, form.planes, 3, 8, 4, size // 4).double().sum(2) * 2.0**-80
    added = values[:, form.item * 12 :].reshape(form.num_items(COLS), sums, 8)
    piece = form.steps * form.width
    for n in range(form.num_items(COLS)):
        groups = torch.zeros(form.num_scales, TOKENS)
        for e in range(form.item):
            p, rest = divmod(e, size)
            first = n // form.interleave * form.interleave * form.item + n % form.interleave * piece
            k = first + p * form.interleave * piece + rest
            q = place(form, p, rest // form.width, rest % form.width)
            assert torch.equal(parts[n, q[0], :TOKENS, q[1], q[2]].float(), x[:, k])
            groups[p * form.num_scales // form.planes] += x[:, k]
        if sums:
            torch.testing.assert_close(added[n, :, :TOKENS], groups, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K", "IQ1_S_TERNARY", "FP8"])
def test_lanes_become_the_same_thirds(fmt):
    form = device_format(FORMATS[fmt], COLS)
    x = torch.randn(8, COLS, device=DEVICE)
    found, wanted = (numbers(to_thirds(rows, form), form) for rows in (to_lanes(x, form), x))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # sums may be added up in another order


def test_more_tokens_than_kernels_are_made_for():
    form = device_format(FORMATS["Q4_K"], COLS)
    x = torch.randn(19, COLS, device=DEVICE)
    thirds, last = to_thirds(x, form, 16), to_thirds(x[16:], form, 16)
    items = form.num_items(COLS)
    assert thirds.thirds == 16 and last.thirds == 8 and len(thirds.values) == 2 * items
    first = to_thirds(x[:16], form, 16)
    assert torch.equal(thirds.values[:items], first.values)
