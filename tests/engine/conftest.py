"""Fixtures of the engine's tests: on a GPU, what one leaves behind there is not the next one's."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    """Whatever a test allows this process of the card, others get all of it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def free_card() -> None:
    """For models with a budget, in which all counts that the process has in VRAM: nothing of earlier tests is there."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
