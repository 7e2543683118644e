"""Bytes on a device as the pointers that kernels take, and the codebooks that lie there."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.few_products import CONSTANTS
from moesaic.kernels.triton.formats import DeviceFormat

__all__ = ["WeightViews", "constants_on", "grid_of", "is_interpreted", "views_of", "weight_views"]


@dataclass(frozen=True, slots=True, eq=False)
class WeightViews:
    """The same bytes as int32, float16 and uint8."""

    words: torch.Tensor
    halves: torch.Tensor
    bytes: torch.Tensor

    def panels(self, first: int, units: int) -> WeightViews:
        """From a panel on; a panel is `units` times 16 bytes."""
        at = first * units
        return WeightViews(self.words[4 * at :], self.halves[8 * at :], self.bytes[16 * at :])


def views_of(data: torch.Tensor) -> WeightViews:
    """Views of uint8 `[n]`, n a multiple of 4."""
    return WeightViews(data.view(torch.int32), data.view(torch.float16), data)


def weight_views(weight: DeviceTensor, index: int) -> WeightViews:
    """Views of one matrix of a stack.

    Raises:
        KernelError: there is no such matrix.
    """
    if not 0 <= index < weight.num_matrices:
        raise KernelError(f"Matrix {index} of a tensor with {weight.num_matrices} on {weight.device}.")
    first = index * weight.matrix_bytes
    return views_of(weight.data[first : first + weight.matrix_bytes])


@functools.cache
def _grid_on(form: DeviceFormat, device: torch.device) -> torch.Tensor:
    assert form.grid is not None
    return form.grid().to(device)


def grid_of(form: DeviceFormat, views: WeightViews) -> torch.Tensor:
    """The format's codebook on the weights' device, copied there once; anything if it has none."""
    return views.words if form.grid is None else _grid_on(form, views.words.device)


@functools.cache
def constants_on(device: torch.device) -> torch.Tensor:
    """`products.CONSTANTS` on a device, copied there once."""
    return torch.tensor(CONSTANTS, dtype=torch.int32, device=device)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)
