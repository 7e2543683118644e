"""A stack of packed matrices cut over the memory nodes of the computer. It knows no experts but where they may be cut.

Every slice is a packed stack of its own that lies on one node, so nothing is held twice. A cut goes through rows or
through columns of all matrices of the stack alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels.packed import PackedTensor
from moesaic.quant import WeightFormat

__all__ = ["SlicedTensor", "cut_intermediate", "empty_stack"]

Axis = Literal["rows", "cols"]

_ROWS_OF_ITEM = 32  # csrc/moe.cpp: rows of gate and up that one work item makes, and one group of down's input


def cut_intermediate(intermediate: int, down: WeightFormat, num_nodes: int | None = None) -> tuple[int, ...]:
    """Sizes of the slices of an intermediate dimension, one per node.

    A slice is a multiple of 32 and of the block of down, whose columns it is (the last one may be shorter where the
    whole is no multiple), so slices are uneven if they have to be: 768 columns of Q4_K on two nodes are 512 and 256.
    There are fewer slices than nodes if there are not enough blocks.

    Args:
        intermediate: size of the dimension.
        down: format of the down projection.
        num_nodes: how many nodes; None: those that this process uses.
    """
    nodes = len(_native.numa_nodes()) if num_nodes is None else num_nodes
    unit = math.lcm(_ROWS_OF_ITEM, down.block_size)
    num_units = -(-intermediate // unit)
    count = min(nodes, num_units)
    ends = [min(-(-num_units * (i + 1) // count) * unit, intermediate) for i in range(count)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def empty_stack(
    fmt: WeightFormat, rows: int, cols: int, num_matrices: int, sizes: tuple[int, ...], axis: Axis
) -> PackedTensor | SlicedTensor:
    """Memory for a stack of matrices, cut along `axis` into slices of these sizes if there are several.

    Slice s lies on the first of the nodes whose threads compute it (csrc/work_queue.h, `group_work`).

    Raises:
        UnsupportedFormatError: a number of columns is not a multiple of the format's block size.
        KernelError: a size is below 1, or there is no memory.
    """
    if len(sizes) == 1:
        return PackedTensor.empty(fmt, rows, cols, num_matrices)
    num_nodes = len(_native.numa_nodes())
    slices = []
    for index, size in enumerate(sizes):
        shape = (size, cols) if axis == "rows" else (rows, size)
        node = min(-(-index * num_nodes // len(sizes)), num_nodes - 1)
        slices.append(PackedTensor.empty(fmt, *shape, num_matrices, node=node))
    return SlicedTensor(tuple(slices), axis)


@dataclass(frozen=True, slots=True, eq=False)
class SlicedTensor:
    """A stack of equal matrices `[rows, cols]` in slices; what a `PackedTensor` is, in several pieces.

    Attributes:
        slices: stacks of the same format and as many matrices.
        axis: along which the matrices are cut.
    """

    slices: tuple[PackedTensor, ...]
    axis: Axis

    def __post_init__(self) -> None:
        kept = {
            (part.format, part.num_matrices, part.cols if self.axis == "rows" else part.rows) for part in self.slices
        }
        if len(kept) != 1:
            raise KernelError(f"Slices along {self.axis} are {kept}: expected one format, number and width.")

    @property
    def format(self) -> WeightFormat:
        """The format of all slices."""
        return self.slices[0].format

    @property
    def num_matrices(self) -> int:
        """How many matrices."""
        return self.slices[0].num_matrices

    @property
    def rows(self) -> int:
        """Output features of one matrix."""
        return self.slices[0].rows if self.axis == "cols" else sum(part.rows for part in self.slices)

    @property
    def cols(self) -> int:
        """Input features."""
        return self.slices[0].cols if self.axis == "rows" else sum(part.cols for part in self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.nbytes for part in self.slices)

    def pack_(self, index: int, raw: np.ndarray, source: WeightFormat | None = None) -> None:
        """Store one matrix, uint8 `[rows, row_bytes]`, in `source`'s blocks; as `PackedTensor.pack_`.

        Raises:
            KernelError: there is no such matrix, or `raw` has another shape or type.
        """
        source = source or self.format
        expected = (self.rows, source.row_bytes(self.cols))
        if raw.shape != expected:
            raise KernelError(f"Rows to pack are {raw.dtype} {list(raw.shape)}: expected uint8 {list(expected)}.")
        first = 0
        for part in self.slices:
            if self.axis == "rows":
                part.pack_(index, raw[first : first + part.rows], source)
                first += part.rows
            else:
                num_bytes = source.row_bytes(part.cols)
                part.pack_(index, raw[:, first : first + num_bytes], source)
                first += num_bytes

    def unpack(self, index: int = 0) -> np.ndarray:
        """One matrix as it was given to `pack_`, bit by bit: uint8 `[rows, row_bytes]`."""
        return np.concatenate([part.unpack(index) for part in self.slices], axis=0 if self.axis == "rows" else 1)

    def dequantize(self) -> torch.Tensor:
        """All weights as float32 `[num_matrices, rows, cols]`."""
        return torch.cat([part.dequantize() for part in self.slices], dim=1 if self.axis == "rows" else 2)
