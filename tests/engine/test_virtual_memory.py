"""Lots of memory behind addresses that stay: all are accounted for, and come back."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from tests.engine.fake_memory import FakeMemory

from moesaic.engine.gpu.virtual_memory import MemoryStock, VirtualBuffer
from moesaic.errors import KernelError

LOT = FakeMemory.granularity


def test_what_one_gives_back_another_can_have() -> None:
    driver = FakeMemory()
    stock = MemoryStock(driver, LOT, 5)
    first, second = VirtualBuffer(stock, 4, 3), VirtualBuffer(stock, 5, 2)
    assert (stock.num_free, stock.nbytes, first.nbytes, second.nbytes) == (0, 5 * LOT, 3 * LOT, 2 * LOT)
    first.data[: 3 * LOT] = 7
    address = first.data.data_ptr()
    with pytest.raises(KernelError, match="all 5 lots"):
        second.resize(3)
    assert (second.num_mapped, stock.num_free) == (2, 0)
    first.resize(1)
    second.resize(4)
    second.data[: 4 * LOT] = 9
    assert (first.num_mapped, second.num_mapped, stock.num_free, stock.nbytes) == (1, 4, 0, 5 * LOT)
    assert first.data.data_ptr() == address and bool((first.data[:LOT] == 7).all())
    assert driver.calls.count("create") == 5 and "release" not in driver.calls
    second.resize(0)
    assert stock.num_free == 4
    for wrong in (-1, 6):
        with pytest.raises(KernelError, match="lots in a buffer for 5"):
            second.resize(wrong)


@pytest.mark.parametrize("refused", ["map", "allow", "create"])
def test_a_device_that_refuses_leaves_everything_as_it_was(refused: str) -> None:
    driver = FakeMemory()
    stock = MemoryStock(driver, LOT, 5)
    buffer = VirtualBuffer(stock, 5, 1)
    driver.refuse.add(refused)
    with pytest.raises(KernelError, match=refused):
        buffer.resize(3)
    driver.refuse.clear()
    assert (buffer.num_mapped, stock.num_free, len(driver.mapped)) == (1, 4, 1)
    buffer.resize(5)
    buffer.data.fill_(1)


def test_a_full_card_is_said() -> None:
    stock = MemoryStock(FakeMemory(num_pieces=2), LOT, 5)
    with pytest.raises(KernelError, match="out of memory"):
        VirtualBuffer(stock, 5, 3)
    assert VirtualBuffer(stock, 2, 2).num_mapped == 2


def test_a_buffer_begins_with_a_lot() -> None:
    stock = MemoryStock(FakeMemory(), LOT, 5)
    with pytest.raises(KernelError, match="0 of 3 lots"):
        VirtualBuffer(stock, 3, 0)
    with pytest.raises(KernelError, match="multiples"):
        MemoryStock(FakeMemory(), LOT + 1, 5)


def test_everything_goes_back_with_the_last_tensor() -> None:
    driver = FakeMemory()
    buffer = VirtualBuffer(MemoryStock(driver, LOT, 5), 4, 2)
    view = buffer.data
    del buffer
    gc.collect()
    assert len(driver.pieces) == 2  # somebody can still use it
    del view
    gc.collect()
    assert not driver.pieces and not driver.mapped and driver.calls.count("free") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cards_memory_moves_between_addresses_that_a_graph_knows() -> None:
    from moesaic.engine.gpu.cuda_memory import CudaMemory, why_not

    assert why_not(torch.cuda.current_device()) == ""
    driver = CudaMemory(torch.device("cuda", torch.cuda.current_device()))
    lot = max(2 << 20, driver.granularity)
    before = torch.cuda.mem_get_info()[0]
    stock = MemoryStock(driver, lot, 6)
    first, second = VirtualBuffer(stock, 6, 5), VirtualBuffer(stock, 64, 1)
    for each in (first, second):
        assert each.data.is_cuda and each.data.dtype == torch.uint8 and each.data.data_ptr() % 256 == 0
        each.data[: each.nbytes].fill_(3)
    out = torch.zeros(2, dtype=torch.int64, device="cuda")
    last = second.data[3 * lot : 4 * lot]
    first_lot = first.data[:lot]
    out[0], out[1] = first_lot.sum(), first_lot.sum()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    first.resize(2)
    second.resize(4)
    last.fill_(5)
    with torch.cuda.graph(graph):
        out[0] = first_lot.sum()
        out[1] = last.sum()
    graph.replay()
    assert out.tolist() == [3 * lot, 5 * lot]
    torch.cuda.synchronize()
    second.resize(1)
    first.resize(5)
    first.data[: first.nbytes].fill_(9)
    torch.cuda.synchronize()
    first.resize(2)
    second.resize(4)
    last.fill_(1)
    graph.replay()
    assert out.tolist() == [9 * lot, lot]
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # else others take and give memory of the card meanwhile
    assert stock.nbytes == 6 * lot and (not alone or before - torch.cuda.mem_get_info()[0] >= 6 * lot)
    torch.cuda.synchronize()
    held = torch.cuda.mem_get_info()[0]
    del first_lot, last, graph, each, first, second, stock
    gc.collect()
    assert not alone or torch.cuda.mem_get_info()[0] - held >= 6 * lot


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_without_so_much_memory_says_so() -> None:
    from moesaic.engine.gpu.cuda_memory import CudaMemory

    driver = CudaMemory(torch.device("cuda"))
    size = torch.cuda.get_device_properties(0).total_memory // driver.granularity * driver.granularity
    with pytest.raises(KernelError, match=r"cuMemCreate failed with 2"):
        driver.create(2 * size)


def test_a_computer_without_a_driver_says_why() -> None:
    from moesaic.engine.gpu.cuda_memory import why_not

    if not torch.cuda.is_available():
        assert "libcuda" in why_not(0) or "cuInit" in why_not(0)
