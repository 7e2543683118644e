"""RMS norms against float64."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.triton.norm import add_rms_norm, rms_norm

WIDTHS = [1, 33, 128, 2880, 7168]


def close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * max(1.0, expected.abs().max())


def rms(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width):
    x, weight = torch.randn(3, width, device=DEVICE), torch.randn(width, device=DEVICE)
    close(rms_norm(x, weight, 1e-5), rms(x, weight, 1e-5))
    close(rms_norm(x, None, 0.5), rms(x, torch.ones(width, device=DEVICE), 0.5))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_residual_is_added_first_and_kept(width):
    x, residual, weight = (torch.randn(*shape, device=DEVICE) for shape in ((4, width), (4, width), (width,)))
    total = residual.double() + 0.22 * x.double()
    out = add_rms_norm(x, residual, weight, 1e-6, scale=0.22)
    close(residual, total)
    close(out, rms(total, weight, 1e-6))


def test_strided_rows_in_place():
    wide, weight = torch.randn(5, 3, 64, device=DEVICE), torch.randn(64, device=DEVICE)
    before = wide.clone()
    rows = wide[:, 1]
    assert rms_norm(rows, weight, 1e-6, out=rows) is rows
    close(wide[:, 1], rms(before[:, 1], weight, 1e-6))
    assert torch.equal(wide[:, 0], before[:, 0]) and torch.equal(wide[:, 2], before[:, 2])
    assert rms_norm(wide[:0, 1], weight, 1e-6).shape == (0, 64)


def test_wrong_arguments_are_refused():
    x = torch.randn(2, 12, device=DEVICE)
    bad = [
        ("x is", lambda: rms_norm(x.half(), None, 1e-6)),
        ("x is", lambda: rms_norm(x.t(), None, 1e-6)),
        ("weight is", lambda: rms_norm(x, x[0, :11], 1e-6)),
        ("out", lambda: rms_norm(x, None, 1e-6, out=x[:1])),
        ("residual", lambda: add_rms_norm(x, x[:1], None, 1e-6)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
