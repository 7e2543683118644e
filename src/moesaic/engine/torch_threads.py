"""Keeping torch's threads off the kernels' cores while a model generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_torch_thread"]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: between two steps others have hardly anything to do, and then spin.

    Measured on 2 cores: Python's share of a decode step falls from 9-16% to 7%.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
