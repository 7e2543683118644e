"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moesaic import kernels


@pytest.fixture(autouse=True)
def several_threads(three_threads: None) -> None:
    """All kernel tests divide work over threads, whatever the machine."""


@pytest.fixture(params=kernels.isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on every instruction set that this machine has, with the same random numbers."""
    torch.manual_seed(0)
    before = kernels.active_isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
