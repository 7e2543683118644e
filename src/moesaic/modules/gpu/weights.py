"""Copies of what the layers of the CPU path hold, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.kernels import PackedTensor
from moesaic.kernels.block_parts import HeadLinears, Linear, Norm
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS, linear
from moesaic.kernels.triton.norm import norm_lanes, rms_norm

__all__ = ["GpuLinear", "GpuLinears", "GpuNorm", "dense_heads"]

PANEL_ROWS = 16
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class GpuLinear:
    """`y = x W^T + b` with a packed `W` on the GPU."""

    weight: DeviceTensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, source: Linear, device: torch.device) -> GpuLinear:
        """A copy."""
        return cls(DeviceTensor.of(source.weight, device), None if source.bias is None else source.bias.to(device))

    @property
    def form(self) -> DeviceFormat:
        """How kernels read it for few tokens."""
        return device_format(self.weight.format, self.weight.cols).lanes

    def __call__(self, x: torch.Tensor | Lanes, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 `[tokens, cols]`, or a few tokens as `lanes` of `form`, to float32 `[tokens, rows]`."""
        return linear(x, self.weight, self.bias, out)


@dataclass(frozen=True, slots=True, eq=False)
class GpuNorm:
    """Weights of an RMS norm, float32 `[width]`, and what is added to the mean square."""

    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, source: Norm, device: torch.device) -> GpuNorm:
        """A copy."""
        return cls(source.weight.detach().to(device), source.eps)

    def __call__(self, x: torch.Tensor, form: DeviceFormat | None) -> torch.Tensor | Lanes:
        """Float32 `[tokens, width]`, normalised for products with matrices of `form` (see `GpuLinears.form`)."""
        if form is None or not 0 < len(x) <= MAX_DECODE_TOKENS:
            return rms_norm(x, self.weight, self.eps)
        return norm_lanes(x, self.weight, self.eps, form)

    def before(self, form: DeviceFormat | None) -> NormBefore | None:
        """For whoever ends the layer before; None if it cannot, as matrices read activations in different orders."""
        return None if form is None else NormBefore(self.weight, self.eps, form)


@dataclass(frozen=True, slots=True, eq=False)
class GpuLinears:
    """Several matrices with the same input, as one product where their format and rows allow it.

    Attributes:
        parts: the products to compute.
        rows: of each matrix, in order.
    """

    parts: tuple[GpuLinear, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, sources: Sequence[Linear], device: torch.device) -> GpuLinears:
        """Copies; panels of equal formats follow each other as if they were one matrix."""
        rows = tuple(source.weight.rows for source in sources)
        parts = tuple(GpuLinear.of(source, device) for source in sources)
        formats = {part.weight.format for part in parts}
        if len(formats) == 1 and not any(count % PANEL_ROWS for count in rows):
            parts = (_joined(parts),)
        return cls(parts, rows)

    @property
    def data(self) -> list[torch.Tensor]:
        """The packed bytes of all."""
        return [part.weight.data for part in self.parts]

    @property
    def form(self) -> DeviceFormat | None:
        """How kernels read all of them, if they read activations in one order; None if not."""
        forms = [part.form for part in self.parts]
        return forms[0] if all(form.orders == forms[0].orders for form in forms) else None

    def __call__(self, x: torch.Tensor | Lanes) -> tuple[torch.Tensor, ...]:
        """Float32 `[tokens, cols]`, or a few tokens as `lanes` of `form`, to float32 `[tokens, rows]` each.

        They are views of one tensor where they are one product.
        """
        if len(self.parts) == 1:
            joined: tuple[torch.Tensor, ...] = self.parts[0](x).split(self.rows, dim=1)
            return joined
        return tuple(part(x) for part in self.parts)


def _joined(parts: Sequence[GpuLinear]) -> GpuLinear:
    """One matrix of the rows of all, in order; the rows of each are a multiple of a panel's."""
    weights = [part.weight for part in parts]
    first = weights[0]
    panel_bytes = PANEL_ROWS * first.format.row_bytes(first.cols)
    data = torch.cat([weight.data[: weight.rows // PANEL_ROWS * panel_bytes] for weight in weights])
    padding = -len(data) % _ALIGNMENT
    if padding:
        data = torch.cat([data, data.new_zeros(padding)])
    rows = sum(weight.rows for weight in weights)
    bias = None
    if any(part.bias is not None for part in parts):
        zeros = [torch.zeros(part.weight.rows, device=data.device) for part in parts]
        bias = torch.cat([zero if part.bias is None else part.bias for part, zero in zip(parts, zeros, strict=True)])
    return GpuLinear(DeviceTensor(first.format, 1, rows, first.cols, data, len(data)), bias)


def dense_heads(source: HeadLinears, heads: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One matrix per head with its packed weights expanded: `[heads, rows, cols]` of `dtype` on the GPU.

    A matrix of `kv_b_proj` is read in both directions (keys are absorbed by its transpose), which packed rows do not
    serve; expanded, the library's batched product does both.
    """
    weight: PackedTensor = source.weight
    values = weight.dequantize()  # [matrices, rows, cols]
    per_head = values if weight.num_matrices > 1 or heads == 1 else values.view(heads, -1, weight.cols)
    return per_head[:, source.rows].to(dtype).to(device).contiguous()
