"""What the blocks of `blocks` are described with: matrices, norms and routing, as the extension has to know them.

It knows sizes and addresses, no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.errors import KernelError
from moesaic.kernels._checks import vector_address
from moesaic.kernels.packed import PackedTensor

__all__ = ["NO_MATRIX", "NO_NORM", "HeadLinears", "Linear", "Norm", "RouteOptions"]

NO_MATRIX = (0, 0, 0, 0, 0)
"""What the extension takes for a matrix that is not there."""
NO_NORM = (0, 0.0)
"""The same for a norm."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed matrix and its bias, float32 `[rows]`."""

    weight: PackedTensor
    bias: torch.Tensor | None = None

    def arguments(self, name: str, cols: int) -> tuple[int, int, int, int, int]:
        """What the extension has to know of it.

        Raises:
            KernelError: it has another number of columns than `cols`, or its bias does not fit.
        """
        w = self.weight
        if w.cols != cols:
            raise KernelError(f"{name} has {w.cols} columns: expected {cols}.")
        return w.format.ggml_type, w.address(), w.rows, cols, vector_address(f"{name}'s bias", self.bias, w.rows)


@dataclass(frozen=True, slots=True)
class Norm:
    """Weights of an RMS norm, float32 `[width]`, and what is added to the mean square."""

    weight: torch.Tensor
    eps: float

    def arguments(self, name: str, width: int) -> tuple[int, float]:
        """What the extension has to know of it; KernelError if it is not `width` wide."""
        return vector_address(name, self.weight, width), self.eps


@dataclass(frozen=True, slots=True)
class HeadLinears:
    """One matrix per head: matrix h of a stack, or rows of one matrix that the heads share evenly.

    Attributes:
        weight: a stack of `heads` matrices, or one matrix.
        rows: these rows of each head's part.
    """

    weight: PackedTensor
    rows: slice

    def arguments(
        self, name: str, heads: int, num_rows: int, cols: int
    ) -> tuple[int, int, int, int, int, int, int, int]:
        """What the extension has to know of them; KernelError unless each head has `num_rows` rows of `cols`."""
        w, (first, end, step) = self.weight, self.rows.indices(self.weight.rows)
        stacked = w.num_matrices > 1 or heads == 1
        head_rows = w.rows if stacked else w.rows // heads
        if (stacked and w.num_matrices != heads) or (not stacked and w.rows % heads) or end > head_rows or step != 1:
            raise KernelError(
                f"{name}: rows {first} to {end} of {w.num_matrices} x {w.rows} do not serve {heads} heads."
            )
        if end - first != num_rows or w.cols != cols:
            raise KernelError(f"{name} is {end - first} x {w.cols} per head: expected {num_rows} x {cols}.")
        matrix_bytes, row_step = (w.matrix_bytes, 0) if stacked else (0, head_rows)
        return w.format.ggml_type, w.address(), w.rows, w.cols, matrix_bytes, row_step, first, num_rows


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How router logits become experts and weights; see `ops.route`."""

    top_k: int
    score: str = "softmax"
    bias: torch.Tensor | None = None
    group_score: str = "none"
    num_groups: int = 1
    topk_groups: int = 1
    normalize: bool = False
    sum_offset: float = 0.0
    sum_minimum: float = 0.0
    scale: float = 1.0
