"""Packed weights in the memory of a GPU: the bytes of a `PackedTensor`, elsewhere. Knows neither files nor models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.packed import PackedTensor
from moesaic.quant import WeightFormat

__all__ = ["DeviceTensor"]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """A stack of equal packed matrices `[rows, cols]` on a GPU (docs/architecture.md, "Packed layout").

    Attributes:
        format: the format whose bits and values the matrices keep.
        num_matrices: how many, e.g. one per head.
        rows: output features of one matrix.
        cols: input features.
        data: uint8 `[num_matrices * matrix_bytes]`, contiguous, on the device that computes.
        matrix_bytes: bytes from one matrix to the next, a multiple of 64.
    """

    format: WeightFormat
    num_matrices: int
    rows: int
    cols: int
    data: torch.Tensor
    matrix_bytes: int

    def __post_init__(self) -> None:
        expected = self.num_matrices * self.matrix_bytes
        if self.data.dtype != torch.uint8 or self.data.shape != (expected,) or not self.data.is_contiguous():
            raise KernelError(
                f"The data of a tensor on a GPU is {describe(self.data)}: expected uint8 [{expected}], contiguous."
            )

    @staticmethod
    def of(packed: PackedTensor, device: torch.device | str) -> DeviceTensor:
        """A copy of packed weights on `device`, in one transfer; the caller may drop the original afterwards."""
        data = torch.empty(packed.data.shape, dtype=torch.uint8, device=device)
        data.copy_(packed.data)
        return DeviceTensor(packed.format, packed.num_matrices, packed.rows, packed.cols, data, packed.matrix_bytes)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.data.numel()
