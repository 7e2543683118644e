"""What is added to hidden states, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.triton.elementwise import add_gated_, add_scaled_, combine, gate_heads_


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def close(actual, expected):
    assert (actual.double() - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_combine(given, gated):
    if gated and not given[0]:
        return
    hidden, parts = random(3, 2880), [random(3, 2880) if is_given else None for is_given in given]
    gate = random(3, 1) if gated else None
    doubles = [torch.zeros(1, device=DEVICE) if part is None else part.double() for part in parts]
    doubles[0] = doubles[0] * (torch.sigmoid(gate.double()) if gated else 1.0)
    expected = hidden.double() + 0.22 * sum(doubles)
    assert combine(hidden, *parts, 0.22, gate) is hidden
    close(hidden, expected)


def test_rows_that_are_parts_of_wider_ones():
    wide, y, gate = random(4, 3, 100), random(4, 100), random(4, 2)
    before = wide.clone()
    add_scaled_(wide[:, 1], y, 0.5)
    close(wide[:, 1], before[:, 1].double() + 0.5 * y.double())
    add_gated_(wide[:, 2], y, gate[:, 1])
    close(wide[:, 2], before[:, 2].double() + torch.sigmoid(gate[:, 1:].double()) * y.double())
    assert torch.equal(wide[:, 0], before[:, 0])
    assert combine(wide[:0, 0], y[:0], None, None).shape == (0, 100)


def test_gates_of_heads():
    both, x = random(3, 10, 48), random(3, 5, 48)
    expected = x.double() * torch.sigmoid(both[:, 1::2].double())
    assert gate_heads_(x, both[:, 1::2]) is x
    close(x, expected)
    assert gate_heads_(x[:0], both[:0, ::2]).shape == (0, 5, 48)


def test_wrong_arguments_are_refused():
    x = random(2, 12)
    bad = [
        ("hidden is", lambda: add_scaled_(x.half(), x)),
        ("shared is", lambda: add_scaled_(x, x[:1])),
        ("cached is", lambda: combine(x, None, x.double(), None)),
        ("from_cpu is", lambda: combine(x, None, None, random(12, 2).t())),
        ("shared_gate is float32", lambda: add_gated_(x, x, x)),
        ("gate is", lambda: gate_heads_(x[:, None], x[:, None, :6])),
        ("without shared", lambda: combine(x, None, x, None, shared_gate=x[:, 0])),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
