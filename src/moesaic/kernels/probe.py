"""What this machine can reach, measured: the yardsticks of benches and of `moesaic doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic import _native
from moesaic.errors import KernelError

__all__ = ["Rates", "peak_ops", "read_bandwidth"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of equal repetitions: GB/s or 10^9 operations per second."""

    best: float
    median: float


def read_bandwidth(num_bytes: int = 1 << 30, seconds: float = 1.0) -> Rates:
    """GB/s (10^9 bytes) at which all threads together read memory that they allocated and touched themselves.

    Args:
        num_bytes: memory to read, in all; several times the last-level cache, or the figure is that of the cache.
        seconds: time to spend on repetitions, besides the time to fill the memory.

    Raises:
        KernelError: num_bytes or seconds are not positive.
        MemoryError: there is not that much memory.
    """
    if num_bytes < 1 or not 0 < seconds < 3600:
        raise KernelError(f"cannot read {num_bytes} bytes for {seconds} seconds: expected positive numbers.")
    return Rates(*_native.read_bandwidth(num_bytes, seconds))


def peak_ops(kind: Literal["fma_f32", "dot_i8"], seconds: float = 0.2) -> Rates:
    """10^9 operations per second of all threads, operands in registers, with the active instruction set.

    Args:
        kind: "fma_f32" (float32 multiply-adds) or "dot_i8" (8-bit products summed in 32 bits); two operations each.
        seconds: time to spend.

    Raises:
        KernelError: an unknown kind.
    """
    kinds = {"fma_f32": _native.PeakKind.MULTIPLY_ADD_F32, "dot_i8": _native.PeakKind.DOT_I8}
    if kind not in kinds:
        raise KernelError(f"kind is '{kind}': expected one of {', '.join(kinds)}.")
    return Rates(*_native.peak_ops(kinds[kind].value, seconds))
