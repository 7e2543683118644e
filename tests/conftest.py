"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: kernels for a GPU run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests."""
    parser.addoption("--soak-seconds", type=float, default=60.0, help="how long tests/server/test_soak.py asks (60)")


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """Of `--soak-seconds`."""
    return float(request.config.getoption("--soak-seconds"))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Tiny models on many threads spend their time waiting: one thread for torch, the native kernels have their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
