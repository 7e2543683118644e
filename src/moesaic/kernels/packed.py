"""Weights in the packed layout, and the memory that holds them. It knows neither files nor models."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.quant import WeightFormat

__all__ = ["PackedTensor"]

_ALIGNMENT = 64  # a cache line: no matrix shares one with another
_HUGE_PAGE = 2 << 20
_ALL_NODES = -1


def _allocate(nbytes: int, node: int | None) -> torch.Tensor:
    """Uint8 [nbytes], aligned to cache lines; on huge pages where the system grants them: decode touches every page.

    It lies on one memory node, or spread over all of them so that every memory channel is read.
    """
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise KernelError(f"{nbytes / 2**30:.2f} GiB for packed weights cannot be allocated: {error}.") from error
    with contextlib.suppress(OSError):  # a system without huge pages is only slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    _native.place_memory(data.data_ptr(), nbytes, _ALL_NODES if node is None else node)
    return data


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A stack of equal matrices `[rows, cols]`, each packed on its own (docs/architecture.md, "Packed layout").

    Attributes:
        format: the format whose bits (recoded ones: whose values) the matrices keep.
        num_matrices: how many, e.g. one per expert.
        rows: output features of one matrix.
        cols: input features, a multiple of the format's block size.
        data: uint8 `[num_matrices * matrix_bytes]` on the CPU, aligned to 64 bytes.
        matrix_bytes: bytes from one matrix to the next.
    """

    format: WeightFormat
    num_matrices: int
    rows: int
    cols: int
    data: torch.Tensor
    matrix_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.num_matrices < 1 or self.rows < 1 or self.cols < 1:
            raise KernelError(
                f"A packed tensor of {self.num_matrices} matrices of {self.rows} x {self.cols}: expected at least 1."
            )
        self.format.row_bytes(self.cols)  # refuses a bad number of columns
        object.__setattr__(self, "matrix_bytes", self._matrix_bytes(self.format, self.rows, self.cols))
        expected = self.num_matrices * self.matrix_bytes
        if (
            self.data.dtype != torch.uint8
            or self.data.shape != (expected,)
            or not self.data.is_contiguous()
            or self.data.device.type != "cpu"
            or self.data.data_ptr() % _ALIGNMENT
        ):
            raise KernelError(
                f"The data of a packed tensor is {describe(self.data)}: expected uint8 [{expected}] on the CPU, "
                f"contiguous and aligned to {_ALIGNMENT} bytes."
            )

    @staticmethod
    def _matrix_bytes(fmt: WeightFormat, rows: int, cols: int) -> int:
        nbytes = int(_native.packed_nbytes(fmt.ggml_type, rows, cols))
        return (nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT

    @staticmethod
    def empty(fmt: WeightFormat, rows: int, cols: int, num_matrices: int = 1, node: int | None = None) -> PackedTensor:
        """Memory for a stack of matrices, whose weights are undefined until `pack_`.

        Args:
            fmt: format of the weights.
            rows: output features of one matrix.
            cols: input features.
            num_matrices: how many.
            node: position in `_native.numa_nodes()` of the memory node to lie on; None spreads them over all.

        Raises:
            UnsupportedFormatError: `cols` is not a multiple of the format's block size.
            KernelError: a size is below 1, or there is no memory.
        """
        if num_matrices < 1 or rows < 1 or cols < 1:
            raise KernelError(
                f"A packed tensor of {num_matrices} matrices of {rows} x {cols}: expected at least 1 of each."
            )
        fmt.row_bytes(cols)
        nbytes = num_matrices * PackedTensor._matrix_bytes(fmt, rows, cols)
        return PackedTensor(fmt, num_matrices, rows, cols, _allocate(nbytes, node))

    @property
    def slices(self) -> tuple[PackedTensor, ...]:
        """Itself: a stack that is not cut over memory nodes (see `SlicedTensor`)."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.data.numel()

    def address(self, index: int = 0) -> int:
        """Address of one matrix.

        Raises:
            KernelError: there is no such matrix.
        """
        if not 0 <= index < self.num_matrices:
            raise KernelError(f"Matrix {index} of a packed tensor with {self.num_matrices}.")
        return self.data.data_ptr() + index * self.matrix_bytes

    def pack_(self, index: int, raw: np.ndarray, source: WeightFormat | None = None) -> None:
        """Store one matrix; safe to call from several threads for different matrices.

        Args:
            index: which matrix.
            raw: uint8 `[rows, row_bytes]`, the blocks as a GGUF file holds them; rows may be any distance apart.
            source: format of these blocks, if this stack's is another form of it; they are recoded on the way.

        Raises:
            KernelError: there is no such matrix, `raw` has another shape or type, or the stack's format is no other
                form of `source`.
        """
        source = source or self.format
        if source != self.format and self.format.recodes != source.ggml_type:
            raise KernelError(f"Rows of {source.name} cannot be packed as {self.format.name}, no other form of it.")
        expected = (self.rows, source.row_bytes(self.cols))
        if raw.dtype != np.uint8 or raw.shape != expected or (expected[1] > 1 and raw.strides[1] != 1):
            raise KernelError(
                f"Rows to pack are {raw.dtype} {list(raw.shape)} with strides {list(raw.strides)}: expected uint8 "
                f"{list(expected)}, contiguous along a row ({source.name}, {self.rows} x {self.cols})."
            )
        _native.pack(
            self.format.ggml_type,
            self.rows,
            self.cols,
            raw.ctypes.data,
            raw.strides[0],
            self.address(index),
            source.ggml_type,
        )

    def unpack(self, index: int = 0) -> np.ndarray:
        """One matrix as it was given to `pack_`, bit by bit, or recoded: uint8 `[rows, row_bytes]`."""
        raw = np.empty((self.rows, self.format.row_bytes(self.cols)), np.uint8)
        _native.unpack(self.format.ggml_type, self.rows, self.cols, self.address(index), raw.ctypes.data)
        return raw

    def dequantize(self) -> torch.Tensor:
        """All weights as float32 `[num_matrices, rows, cols]`, the same values as `moesaic.quant.dequantize`."""
        values = torch.empty(self.num_matrices, self.rows, self.cols)
        for index in range(self.num_matrices):
            raw = self.unpack(index)
            out = values[index]
            _native.dequantize(self.format.ggml_type, self.rows, self.cols, raw.ctypes.data, out.data_ptr())
        return values
