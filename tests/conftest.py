"""Settings of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from tests.triton_interpreter import quicken_interpreter

from moesaic import kernels

if not torch.cuda.is_available():  # before anything imports triton: kernels for a GPU run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests."""
    parser.addoption("--soak-seconds", type=float, default=40.0, help="how long tests/server/test_soak.py asks (40)")


def pytest_configure() -> None:
    """What tests import makes a million objects that stay: nothing to look through again and again meanwhile."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor afterwards: collections look at what tests make."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """The end of the process frees everything: the extension tells what it still holds then."""
    gc.unfreeze()


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """Of `--soak-seconds`."""
    return float(request.config.getoption("--soak-seconds"))


def pytest_runtest_setup() -> None:
    """Whichever module imported Triton."""
    quicken_interpreter()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models on many threads spend their time waiting, above all beside another process that runs tests.

    One thread for torch and one for the kernels. Those of tests/kernels run on three, and so does what asks for the
    fixture `three_threads`; processes that tests start have as many as a user's.
    """
    before = torch.get_num_threads(), kernels.num_threads()
    torch.set_num_threads(1)
    kernels.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    kernels.set_num_threads(before[1])


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Three threads for the kernels, which is no divisor of most sizes."""
    before = kernels.num_threads()
    kernels.set_num_threads(3)
    yield
    kernels.set_num_threads(before)
