"""What this machine can reach, measured: the yardsticks of benches and of `moesaic doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic import _native
from moesaic.errors import KernelError

__all__ = ["Rates", "peak_ops", "read_bandwidth", "tiles_from"]


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of equal repetitions: GB/s or 10^9 operations per second.

    Attributes:
        best: of all repetitions; what the hardware did when nothing was in its way.
        median: what it sustains: the yardstick for decode, which is sustained too.
    """

    best: float
    median: float


def read_bandwidth(num_bytes: int, seconds: float = 1.0) -> Rates:
    """GB/s (10^9 bytes) at which all threads together read memory that they allocated and touched themselves.

    Args:
        num_bytes: memory to read, in all: `Hardware.probe_bytes` of placement, or the figure is that of a cache.
        seconds: time to spend on repetitions, besides the time to fill the memory; there are at least three.

    Raises:
        KernelError: num_bytes or seconds are not positive.
        MemoryError: there is not that much memory.
    """
    if num_bytes < 1 or not 0 < seconds < 3600:
        raise KernelError(f"cannot read {num_bytes} bytes for {seconds} seconds: expected positive numbers.")
    return Rates(*_native.read_bandwidth(num_bytes, seconds))


def peak_ops(kind: Literal["fma_f32", "dot_i8", "tile_bf16"], seconds: float = 0.2) -> Rates:
    """10^9 operations per second of all threads, operands in registers, with the active instruction set.

    Args:
        kind: "fma_f32" (float32 multiply-adds), "dot_i8" (8-bit products summed in 32 bits) or "tile_bf16" (AMX tiles
            of bfloat16, float32 sums); two operations for each multiply-add.
        seconds: time to spend.

    Raises:
        KernelError: an unknown kind, or one that the active instruction set does not have.
    """
    kinds = {
        "fma_f32": _native.PeakKind.MULTIPLY_ADD_F32,
        "dot_i8": _native.PeakKind.DOT_I8,
        "tile_bf16": _native.PeakKind.TILE_BF16,
    }
    if kind not in kinds:
        raise KernelError(f"kind is '{kind}': expected one of {', '.join(kinds)}.")
    try:
        return Rates(*_native.peak_ops(kinds[kind].value, seconds))
    except ValueError as error:
        raise KernelError(f"The peak of {kind} cannot be measured: {error}; only amx has them.") from error


def tiles_from(ggml_type: int) -> int | None:
    """From how many tokens on products with a format use tiles of bfloat16, with the active instruction set; or None.

    Raises:
        ValueError: there is no format of this number.
    """
    return int(_native.bf16_from(ggml_type)) or None
