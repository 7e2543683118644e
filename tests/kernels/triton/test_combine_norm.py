"""Ends of layers with the norm of what follows, against float64, in the order of several formats."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.orders import in_order, numbers

from moesaic.errors import KernelError
from moesaic.kernels.triton import combine_norm as module
from moesaic.kernels.triton.combine_norm import NormBefore, SecondNorm, combine_norm
from moesaic.kernels.triton.formats import device_format
from moesaic.kernels.triton.norm import norm_lanes
from moesaic.quant import FORMATS

WIDTHS = {"Q4_K": 768, "IQ1_S": 1280, "Q8_0": 96, "Q6_K": 256, "F32": 100, "MXFP4": 2880}
EPS = 1e-5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def norm(width, fmt):
    return NormBefore(random(width), EPS, device_format(FORMATS[fmt], width))


def check(lanes, hidden, before):
    """What is in `lanes` is the norm of `hidden`, float64."""
    rows, width = hidden.shape
    factors = (hidden.pow(2).mean(-1, keepdim=True) + before.eps).sqrt()
    expected = in_order((hidden / factors * before.weight.double()).float(), before.form)
    assert (lanes.num_tokens, lanes.cols, lanes.order) == (rows, width, expected.order)
    assert lanes.thirds == expected.thirds and lanes.values.shape == expected.values.shape
    found, wanted = numbers(lanes, before.form), numbers(expected, before.form)
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("fmt", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3])
def test_orders_of_formats(fmt, rows):
    before = norm(WIDTHS[fmt], fmt)
    x, y = random(rows, WIDTHS[fmt]), random(rows, WIDTHS[fmt])
    hidden = x.clone()
    check(norm_lanes(x, before.weight, EPS, before.form), x.double(), before)
    check(combine_norm(hidden, y, None, None, 0.5, None, before), x.double() + 0.5 * y.double(), before)
    assert torch.allclose(hidden.double(), x.double() + 0.5 * y.double(), atol=1e-6)


ALL_PARTS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize(
    ("given", "gated"), [*((given, False) for given in ALL_PARTS), *((given, True) for given in ALL_PARTS if given[0])]
)
def test_parts(given, gated):
    before = norm(512, "Q4_K")
    hidden, parts = random(2, 512), [random(2, 512) if is_given else None for is_given in given]
    gate = random(2, 1) if gated else None
    doubles = [torch.zeros(1, device=DEVICE) if part is None else part.double() for part in parts]
    doubles[0] = doubles[0] * (torch.sigmoid(gate.double()) if gated else 1.0)
    expected = hidden.double() + 0.22 * sum(doubles)
    check(combine_norm(hidden, *parts, 0.22, gate, before), expected, before)
    assert (hidden.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_rows_that_do_not_fit_in_registers(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 256)
    before = norm(512, "Q4_K")
    hidden, y = random(2, 512), random(2, 512)
    expected = hidden.double() + y.double()
    check(combine_norm(hidden, None, y, None, 1.0, None, before), expected, before)


@pytest.mark.parametrize("most", [1 << 14, 256])
def test_a_second_norm_has_its_own_weight_and_eps(monkeypatch, most):
    monkeypatch.setattr(module, "_MOST", most)
    before = norm(500, "F32")
    second = SecondNorm(random(500), 0.3, random(2, 500))
    hidden, y = random(2, 500), random(2, 500)
    expected = hidden.double() + y.double()
    check(combine_norm(hidden, y, None, None, 1.0, None, before._replace(second=second)), expected, before)
    factors = (expected.pow(2).mean(-1, keepdim=True) + 0.3).sqrt()
    torch.testing.assert_close(second.out.double(), expected / factors * second.weight.double(), rtol=3e-6, atol=3e-6)


def test_rows_of_a_wider_tensor_and_ones_for_weights():
    form = device_format(FORMATS["Q4_K"], 512)
    x = random(3, 700)[:, 100:612]
    ones = NormBefore(torch.ones(512, device=DEVICE), EPS, form)
    check(norm_lanes(x, None, EPS, form), x.double(), ones)


def test_wrong_arguments_are_refused():
    before = norm(512, "Q4_K")
    x = random(2, 512)
    narrow = SecondNorm(random(512), EPS, random(2, 500))
    half = SecondNorm(random(512).half(), EPS, random(2, 512))
    bad = [
        ("rows", lambda: combine_norm(random(9, 512), None, None, None, 1.0, None, before)),
        ("shared is", lambda: combine_norm(x, x[:1], None, None, 1.0, None, before)),
        ("weight is", lambda: combine_norm(x, x, None, None, 1.0, None, before._replace(weight=before.weight[:9]))),
        ("its out is", lambda: combine_norm(x, x, None, None, 1.0, None, before._replace(second=narrow))),
        ("second norm's weight is", lambda: combine_norm(x, x, None, None, 1.0, None, before._replace(second=half))),
        ("weight is", lambda: norm_lanes(x, before.weight[:9], EPS, before.form)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
