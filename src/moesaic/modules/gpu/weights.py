"""Copies of what the layers of the CPU path hold, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.kernels import PackedTensor
from moesaic.kernels.block_parts import HeadLinears, Linear, Norm
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.linear import linear

__all__ = ["GpuLinear", "GpuNorm", "dense_heads"]


@dataclass(frozen=True, slots=True, eq=False)
class GpuLinear:
    """`y = x W^T + b` with a packed `W` on the GPU."""

    weight: DeviceTensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, source: Linear, device: torch.device) -> GpuLinear:
        """A copy."""
        return cls(DeviceTensor.of(source.weight, device), None if source.bias is None else source.bias.to(device))

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 `[tokens, cols]` to float32 `[tokens, rows]`."""
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


def dense_heads(source: HeadLinears, heads: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One matrix per head with its packed weights expanded: `[heads, rows, cols]` of `dtype` on the GPU.

    A matrix of `kv_b_proj` is read in both directions (keys are absorbed by its transpose), which packed rows do not
    serve; expanded, the library's batched product does both.
    """
    weight: PackedTensor = source.weight
    values = weight.dequantize()  # [matrices, rows, cols]
    per_head = values if weight.num_matrices > 1 or heads == 1 else values.view(heads, -1, weight.cols)
    return per_head[:, source.rows].to(dtype).to(device).contiguous()
