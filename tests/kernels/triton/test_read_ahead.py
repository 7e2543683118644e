"""Reading ahead changes nothing, and reads what it was told to."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.triton.read_ahead import ReadAhead, cache_share


def test_so_many_bytes_of_the_first_tensors_are_read_and_stay_as_they_are():
    tensors = [
        torch.randn(1002, device=DEVICE),
        torch.randint(0, 256, (40000,), dtype=torch.uint8, device=DEVICE),
        torch.randn(3, 64, 8, device=DEVICE, dtype=torch.bfloat16),
    ]
    before = [each.clone() for each in tensors]
    for most, expected in ((1 << 20, 4000 + 40000 + 3072), (20000, 20000), (3999, 3984), (0, 0)):
        ahead = ReadAhead(tensors, most)
        assert ahead.num_bytes == expected
        ahead.launch()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert ReadAhead([], 100).num_bytes == 0


def test_every_word_is_read():
    """The sink gets all that was read, exclusive or, if that happens to be what the kernel compares with."""
    words = torch.zeros(3, 5000, dtype=torch.int32, device=DEVICE)
    for row, col in ((0, 0), (1, 4999), (2, 4321)):
        words.zero_()
        words[row, col] = 0x5EED5EED
        ahead = ReadAhead(words.unbind(), 1 << 20)
        ahead.launch()
        assert ahead._sink.tolist().count(0x5EED5EED) == 1


def test_weights_that_cannot_be_read_are_refused():
    for bad in (torch.zeros(6, dtype=torch.uint8), torch.zeros(4, 4)[:, 1:]):
        with pytest.raises(KernelError, match="read ahead"):
            ReadAhead([bad], 100)
    assert cache_share(torch.device(DEVICE)) > 0
