"""The largest of each row, against the CPU's."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels import ops
from moesaic.kernels.triton import argmax as module
from moesaic.kernels.triton.argmax import argmax


def found(x: torch.Tensor) -> list[int]:
    out = torch.full((len(x),), -1, dtype=torch.int64, device=DEVICE)
    assert argmax(x.to(DEVICE), out) is out
    return out.tolist()


@pytest.mark.parametrize("width", [1, 48, 1024, 1025, 5000])
def test_argmax(width):
    torch.manual_seed(width)
    x = torch.randn(3, width) - 5.0
    assert found(x) == ops.argmax(x).tolist() == x.argmax(-1).tolist()
    x[:, -1] = 7.0
    assert found(x) == [width - 1] * 3


@pytest.mark.skipif(DEVICE == "cpu", reason="takes too long without a GPU")
def test_a_vocabulary():
    x = torch.randn(8, 129280, device=DEVICE)
    assert found(x) == x.argmax(-1).tolist()


@pytest.mark.parametrize("parts", [1, 128])
def test_the_first_of_equal_ones_and_nan_above_all(parts, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PARTS", parts)
    x = torch.full((5, 3000), -torch.inf)
    x[1, [2999, 1100, 1300]] = 2.0
    x[2, 2000], x[2, 7] = -torch.nan, torch.inf
    x[3, 2524], x[3, 1500] = 0.0, -0.0  # in one part, the same place of two blocks
    x[4, 2100] = -3e38
    assert found(x) == ops.argmax(x).tolist() == [0, 1100, 2000, 1500, 2100]


def test_the_largest_values_are_those_of_the_rows():
    x = torch.randn(7, 1500)
    x[1], x[2, 900], x[3, 3], x[4] = -torch.inf, torch.inf, torch.nan, -0.0
    x[5], x[5, 1200] = -3e38, -1.5e-40  # subnormal
    places, largest = torch.zeros(7, dtype=torch.int64, device=DEVICE), torch.zeros(7, device=DEVICE)
    argmax(x.to(DEVICE), places, largest)
    assert places.tolist() == ops.argmax(x).tolist()
    expected = x.amax(-1)
    assert torch.equal(largest.cpu().nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    assert largest[3].isnan()


def test_rows_that_are_parts_of_wider_ones():
    wide = torch.randn(4, 300)
    assert found(wide[:, 50:250]) == wide[:, 50:250].argmax(-1).tolist()
    assert found(wide[:0]) == []


def test_wrong_arguments_are_refused():
    x, out = torch.zeros(2, 12, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for message, call in [
        ("x is", lambda: argmax(x.half(), out)),
        ("x is", lambda: argmax(x[:, :0], out)),
        ("out is", lambda: argmax(x, out.int())),
        ("out is", lambda: argmax(x, out[:1])),
        ("largest is", lambda: argmax(x, out, x[0])),
        ("largest is", lambda: argmax(x, out, out)),
    ]:
        with pytest.raises(KernelError, match=message):
            call()
