"""A device's address space in the memory of this process: what is not mapped cannot be touched, as on a GPU.

A read or write of addresses without memory ends the process (a segmentation fault), and memory that was just mapped is
full of what is no number, so whoever reads what was not written shows.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch

from moesaic.errors import KernelError

_LIBC = ctypes.CDLL(None, use_errno=True)
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class FakeMemory:
    """A `MemoryDriver`.

    Args:
        num_pieces: that can be created; more fail as on a full card.

    Attributes:
        calls: names of the calls so far.
        refuse: names of calls that fail.
    """

    granularity = mmap.PAGESIZE

    def __init__(self, num_pieces: int = 1 << 30) -> None:
        self.num_pieces, self.calls, self.refuse = num_pieces, list[str](), set[str]()
        self.pieces: dict[int, int] = {}  # piece -> bytes
        self.mapped: dict[int, tuple[int, int]] = {}  # address -> piece, bytes
        self.allowed: set[int] = set()
        self._ranges: dict[int, np.ndarray] = {}
        self._next = 1

    def reserve(self, nbytes: int) -> int:
        self._note("reserve", nbytes)
        area = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        address = int(area.ctypes.data)
        self._ranges[address] = area
        self._protect(address, nbytes, _NONE)
        return address

    def free(self, address: int, nbytes: int) -> None:
        self._note("free", nbytes)
        assert not any(address <= at < address + nbytes for at in self.mapped), "addresses are still mapped"
        assert self._ranges.pop(address).nbytes == nbytes

    def create(self, nbytes: int) -> int:
        self._note("create", nbytes)
        if len(self.pieces) >= self.num_pieces:
            raise KernelError("create failed: out of memory.")
        piece, self._next = self._next, self._next + 1
        self.pieces[piece] = nbytes
        return piece

    def release(self, piece: int) -> None:
        self._note("release", 0)
        assert piece not in {each for each, _ in self.mapped.values()}, "it is still mapped"
        del self.pieces[piece]

    def map(self, address: int, piece: int, nbytes: int) -> None:
        self._note("map", nbytes)
        assert self.pieces[piece] == nbytes, "a piece is mapped as a whole"
        assert piece not in {each for each, _ in self.mapped.values()}, "it is mapped already"
        assert all(at + size <= address or address + nbytes <= at for at, (_, size) in self.mapped.items())
        assert any(at <= address and address + nbytes <= at + area.nbytes for at, area in self._ranges.items())
        self.mapped[address] = piece, nbytes

    def allow(self, address: int, nbytes: int) -> None:
        self._note("allow", nbytes)
        end, at = address + nbytes, address
        while at < end:
            at += self.mapped[at][1]
        assert at == end
        self._protect(address, nbytes, _READ_WRITE)
        ctypes.memset(address, 0xFF, nbytes)
        self.allowed |= {each for each in self.mapped if address <= each < end}

    def unmap(self, address: int, nbytes: int) -> None:
        self._note("unmap", nbytes)
        _, size = self.mapped.pop(address)
        assert size == nbytes, "a piece is unmapped as a whole"
        self.allowed.discard(address)
        self._protect(address, nbytes, _NONE)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        assert address in self.allowed, "a tensor of addresses without memory"
        area = self._ranges[address][:nbytes]
        tensor = torch.from_numpy(area)
        tensor.kept = owner  # type: ignore[attr-defined]
        return tensor

    def _note(self, name: str, nbytes: int) -> None:
        assert nbytes % self.granularity == 0
        self.calls.append(name)
        if name in self.refuse:
            raise KernelError(f"{name} failed: refused.")

    @staticmethod
    def _protect(address: int, nbytes: int, protection: int) -> None:
        assert _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection) == 0
