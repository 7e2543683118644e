"""Addresses that stay, memory that moves: ranges of a GPU's address space, of which a beginning has memory behind it.

A range is reserved once and large; kernels and graphs keep its addresses. Memory comes in equal lots from one stock and
is mapped at the end of what a range has, or taken away there. So what one range gives back, another can have, without
anything being copied or allocated. How a device does that is its `MemoryDriver`'s business; who should have how much is
`lending`'s.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch

from moesaic.errors import KernelError

__all__ = ["MemoryDriver", "MemoryStock", "VirtualBuffer"]


class MemoryDriver(Protocol):
    """Address space and memory of a device; sizes and addresses are multiples of `granularity`.

    Every call raises KernelError if the device refuses.
    """

    granularity: int

    def reserve(self, nbytes: int) -> int:
        """Addresses that nobody else gets; the first of them."""

    def free(self, address: int, nbytes: int) -> None:
        """Give reserved addresses back; nothing is mapped there."""

    def create(self, nbytes: int) -> int:
        """A piece of memory without addresses."""

    def release(self, piece: int) -> None:
        """Give a piece back that is mapped nowhere."""

    def map(self, address: int, piece: int, nbytes: int) -> None:
        """Put a whole piece behind addresses; `allow` comes before its use."""

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write what was mapped there."""

    def unmap(self, address: int, nbytes: int) -> None:
        """Take away the piece that was mapped there; nothing that runs may use it."""

    def synchronize(self) -> None:
        """Wait until the device has done everything that it was asked for."""

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """uint8 `[nbytes]`, the addresses; the first lot is there. The tensor keeps `owner` alive."""


class MemoryStock:
    """Lots of memory, made when they are needed first, never more than so many.

    Args:
        driver: of the device.
        lot_bytes: of a lot, a multiple of the driver's granularity.
        num_lots: at most.

    Raises:
        KernelError: the driver has a larger granularity.
    """

    def __init__(self, driver: MemoryDriver, lot_bytes: int, num_lots: int) -> None:
        if lot_bytes % driver.granularity:
            raise KernelError(f"lots of {lot_bytes} bytes: the driver wants multiples of {driver.granularity}.")
        self.driver, self.lot_bytes, self.num_lots = driver, lot_bytes, num_lots
        self._idle: list[int] = []
        self._made = 0

    @property
    def num_free(self) -> int:
        """Lots that can be taken."""
        return self.num_lots - self._made + len(self._idle)

    @property
    def nbytes(self) -> int:
        """Bytes of the lots that were made: what the device holds, in use or not."""
        return self._made * self.lot_bytes

    def take(self) -> int:
        """A lot; KernelError if there is none."""
        if self._idle:
            return self._idle.pop()
        if self._made == self.num_lots:
            raise KernelError(f"all {self.num_lots} lots of {self.lot_bytes >> 20} MiB are in use.")
        piece = self.driver.create(self.lot_bytes)
        self._made += 1
        return piece

    def give_back(self, piece: int) -> None:
        """The lot is mapped nowhere any more."""
        self._idle.append(piece)

    def shrink(self, num_lots: int) -> None:
        """Have so many lots fewer, which must be free; the device gets their memory back.

        Raises:
            KernelError: so many are not free.
        """
        if num_lots > self.num_free:
            raise KernelError(f"{num_lots} lots are to go, and {self.num_free} are free.")
        self.num_lots -= num_lots
        while self._made > self.num_lots:
            self.driver.release(self._idle.pop())
            self._made -= 1

    def grow(self, num_lots: int) -> int:
        """Have up to so many lots more, as far as the device still has memory for them; how many it had."""
        for count in range(num_lots):
            try:
                self._idle.append(self.driver.create(self.lot_bytes))
            except KernelError:
                return count
            self._made += 1
            self.num_lots += 1
        return num_lots

    def close(self) -> None:
        """Give lots that are not in use back to the device."""
        while self._idle:
            self.driver.release(self._idle.pop())
            self._made -= 1

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # a process that ends may have no driver any more
            self.close()


class _Range:
    """Reserved addresses and what is mapped there; tensors keep it alive, so it must not know them."""

    def __init__(self, stock: MemoryStock, num_lots: int) -> None:
        self.stock, self.num_lots, self.pieces = stock, num_lots, list[int]()
        self.nbytes = num_lots * stock.lot_bytes
        self.address = stock.driver.reserve(self.nbytes)

    def push(self, count: int) -> None:
        """Map so many more lots; all or none."""
        driver, size, before = self.stock.driver, self.stock.lot_bytes, len(self.pieces)
        begin = self.address + before * size
        try:
            for index in range(count):
                piece = self.stock.take()
                try:
                    driver.map(begin + index * size, piece, size)
                except KernelError:
                    self.stock.give_back(piece)
                    raise
                self.pieces.append(piece)
            if count:
                driver.allow(begin, count * size)
        except KernelError:
            self.pop(len(self.pieces) - before)
            raise

    def pop(self, count: int) -> None:
        """Unmap the last lots."""
        driver, size = self.stock.driver, self.stock.lot_bytes
        for _ in range(count):
            driver.unmap(self.address + (len(self.pieces) - 1) * size, size)
            self.stock.give_back(self.pieces.pop())

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.stock.driver.synchronize()
            self.pop(len(self.pieces))
            self.stock.driver.free(self.address, self.nbytes)


class VirtualBuffer:
    """Reserved addresses with memory behind the first of them.

    Args:
        stock: where lots come from.
        num_lots: that the addresses are for, at most.
        num_mapped: lots to begin with, at least 1: a tensor of addresses without memory is none.

    Attributes:
        data: uint8 `[num_lots * lot_bytes]`; only the first `nbytes` may be read or written.
    """

    def __init__(self, stock: MemoryStock, num_lots: int, num_mapped: int = 1) -> None:
        if not 1 <= num_mapped <= num_lots:
            raise KernelError(f"{num_mapped} of {num_lots} lots: expected at least one, and no more than there are.")
        self._range = _Range(stock, num_lots)
        self._range.push(num_mapped)
        self.data = stock.driver.tensor(self._range.address, self._range.nbytes, self._range)

    @property
    def num_lots(self) -> int:
        """Lots that the addresses are for."""
        return self._range.num_lots

    @property
    def num_mapped(self) -> int:
        """Lots that are there."""
        return len(self._range.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes that are there."""
        return self.num_mapped * self._range.stock.lot_bytes

    def resize(self, num_mapped: int) -> None:
        """Have so many lots; what is taken away is the end, and nothing that runs may use it.

        Raises:
            KernelError: there are not so many, or the device refuses; the buffer is as before.
        """
        if not 0 <= num_mapped <= self.num_lots:
            raise KernelError(f"{num_mapped} lots in a buffer for {self.num_lots}.")
        if num_mapped > self.num_mapped:
            self._range.push(num_mapped - self.num_mapped)
        else:
            self._range.pop(self.num_mapped - num_mapped)
