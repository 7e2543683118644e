"""What a GPU does while it waits for something that the CPU sends into its memory, a bounded time."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic import _native
from moesaic.kernels.handoff import Mailbox
from moesaic.kernels.triton.handoff import Exchange


def waited(arrived: int, answered: int, steps_before: int, failed: int = 0) -> bool:
    """Whether a wait for the third request of a step fails, where so many requests were made before the step."""
    box = Mailbox.of(1, 16, 2, pinned=DEVICE == "cuda")
    box.answered.fill_(answered)
    exchange = Exchange(box, torch.device(DEVICE))
    exchange.set_timeout(5e-6)  # five looks
    exchange.base.fill_(steps_before)
    exchange.failed.fill_(failed)
    exchange.wait_there(2, torch.tensor([arrived], device=DEVICE))
    return bool(exchange.failed.item())


@pytest.mark.parametrize("before", [0, 40])
def test_what_has_arrived_is_not_waited_for(before: int) -> None:
    assert not waited(before + 3, 0, before) and not waited(before + 4, 0, before)


@pytest.mark.parametrize("before", [0, 40])
def test_what_does_not_arrive_fails_the_step(before: int) -> None:
    assert waited(before + 2, 0, before)
    assert waited(before + 2, before + 3, before)  # an answer of the CPU is something else


def test_who_gave_up_is_not_waited_for() -> None:
    """The CPU has told so, and knows why; or an earlier wait of the step has failed."""
    assert not waited(0, _native.GAVE_UP, 0)
    assert waited(0, 0, 0, failed=1)
