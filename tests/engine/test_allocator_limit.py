"""What PyTorch's allocator may take of a card of 10 GiB, on a card that is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moesaic.engine.gpu.allocator_limit import AllocatorLimit
from moesaic.placement.vram import DRIVER_BYTES

GIB = 1024**3
CARD = torch.device("cuda", 0)


class Allocator:
    """What was allowed last, in bytes, and what is held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed, self.held, self.emptied = 0, 0, 0
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * GIB))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._allow)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty)

    def _allow(self, fraction: float, device: torch.device) -> None:
        assert 0.0 <= fraction <= 1.0 and device == CARD
        self.allowed = round(fraction * 10 * GIB)

    def _empty(self) -> None:
        self.emptied += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_the_budget_less_the_driver_and_what_lies_elsewhere(allocator: Allocator) -> None:
    limit = AllocatorLimit(8 * GIB, CARD)
    assert allocator.allowed == 8 * GIB - DRIVER_BYTES
    limit.leave(5 * GIB)
    assert allocator.allowed == 3 * GIB - DRIVER_BYTES
    limit.leave(8 * GIB)
    assert allocator.allowed == 0
    AllocatorLimit(80 * GIB, CARD)  # more than the card has
    assert allocator.allowed == 10 * GIB


def test_more_for_a_while(allocator: Allocator) -> None:
    limit = AllocatorLimit(8 * GIB, CARD)
    limit.leave(5 * GIB)
    part = 3 * GIB - DRIVER_BYTES
    assert limit.allow(GIB) and allocator.allowed == part + GIB and allocator.emptied == 1
    allocator.held = part + 1
    assert not limit.allow(0) and allocator.emptied == 2  # what it still holds would be beyond the budget
    assert allocator.allowed == part + GIB
    allocator.held = part
    assert limit.allow(0) and allocator.allowed == part
