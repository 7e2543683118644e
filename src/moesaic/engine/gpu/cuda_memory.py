"""CUDA's virtual memory management, called in the driver's library (the chapter of that name in NVIDIA's driver API).

AMD's HIP has the same functions under other names (`hipMemMap` for `cuMemMap`, and so on); nobody has tried them here,
so cards of AMD divide their memory once. This module knows what the driver wants, and not what memory is for.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moesaic.errors import KernelError

__all__ = ["CudaMemory", "why_not"]

_LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED, _DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_data", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("gpu_direct", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(_Properties), ctypes.c_int),
    "cuMemAddressReserve": (
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_uint64,
    ),
    "cuMemAddressFree": (ctypes.c_uint64, ctypes.c_size_t),
    "cuMemCreate": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t, ctypes.POINTER(_Properties), ctypes.c_uint64),
    "cuMemRelease": (ctypes.c_uint64,),
    "cuMemMap": (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64),
    "cuMemUnmap": (ctypes.c_uint64, ctypes.c_size_t),
    "cuMemSetAccess": (ctypes.c_uint64, ctypes.c_size_t, ctypes.POINTER(_Access), ctypes.c_size_t),
}


def why_not(index: int) -> str:
    """Why memory of a card cannot be moved between addresses; "" if it can. The card is not used for that.

    Args:
        index: of the card, as PyTorch counts.
    """
    if torch.version.hip is not None:
        return "moving memory between addresses is not tried on AMD's cards"
    try:
        library = _load()
        _check(library, "cuInit", library.cuInit(0))
        supported = ctypes.c_int()
        device = _device(library, index)
        status = library.cuDeviceGetAttribute(ctypes.byref(supported), _SUPPORTED, device)
        _check(library, "cuDeviceGetAttribute", status)
    except KernelError as error:
        return str(error)
    return "" if supported.value else "the driver does not manage virtual memory of this card"


class CudaMemory:
    """`MemoryDriver` of a card that PyTorch uses already.

    Args:
        device: the card.

    Raises:
        KernelError: see `why_not`.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        problem = why_not(index)
        if problem:
            raise KernelError(f"memory of {device} cannot be moved: {problem}.")
        self._device, self._library = torch.device("cuda", index), _load()
        torch.empty(1, device=self._device)  # the context is there from now on
        location = _Location(_DEVICE, _device(self._library, index))
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)
        size = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(self._properties), _MINIMUM)
        self.granularity = size.value

    def reserve(self, nbytes: int) -> int:
        """As `MemoryDriver`, like all that follow."""
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), nbytes, 0, 0, 0)
        return address.value

    def free(self, address: int, nbytes: int) -> None:
        """Give addresses back."""
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> int:
        """Memory of the card."""
        piece = ctypes.c_uint64()
        self._call("cuMemCreate", ctypes.byref(piece), nbytes, ctypes.byref(self._properties), 0)
        return piece.value

    def release(self, piece: int) -> None:
        """Give memory back."""
        self._call("cuMemRelease", piece)

    def map(self, address: int, piece: int, nbytes: int) -> None:
        """Put it behind addresses."""
        self._call("cuMemMap", address, nbytes, 0, piece, 0)

    def allow(self, address: int, nbytes: int) -> None:
        """Let the card use it."""
        self._call("cuMemSetAccess", address, nbytes, ctypes.byref(self._access), 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Take it away."""
        self._call("cuMemUnmap", address, nbytes)

    def synchronize(self) -> None:
        """Wait for the card."""
        torch.cuda.synchronize(self._device)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """The addresses as a tensor."""
        return torch.as_tensor(_Array(address, nbytes, owner), device=self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        _check(self._library, name, getattr(self._library, name)(*arguments))


class _Array:
    """What PyTorch takes as memory that is there already (the "CUDA array interface", version 3)."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _load() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:  # there is none, or it is too old
        raise KernelError(f"{_LIBRARY}: {error}") from error
    return library


def _device(library: Any, index: int) -> int:
    device = ctypes.c_int()
    _check(library, "cuDeviceGet", library.cuDeviceGet(ctypes.byref(device), index))
    return device.value


def _check(library: Any, name: str, status: int) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    reason = text.value.decode(errors="replace") if text.value else "unknown"
    more = "; other processes may hold the card's memory" if status == _OUT_OF_MEMORY else ""
    raise KernelError(f"{name} failed with {status}: {reason}{more}.")
