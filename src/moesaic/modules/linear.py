"""A linear layer whose weight stays packed in its file's format. It does not know which model it serves."""

from __future__ import annotations

import torch
from torch import nn

from moesaic.kernels import PackedTensor, linear

__all__ = ["PackedLinear"]


class PackedLinear(nn.Module):
    """`y = x W^T + b` on a packed `W`, in place of `nn.Linear`.

    Args:
        weight: one packed matrix `[out_features, in_features]`; not a Parameter, so no dtype or device cast expands it.
        bias: float32 `[out_features]`, or None.
    """

    def __init__(self, weight: PackedTensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = weight.cols, weight.rows

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map float32 `[..., in_features]` to float32 `[..., out_features]`."""
        flat = hidden_states.reshape(-1, self.in_features)
        return linear(flat, self.packed, self.bias).view(*hidden_states.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """All weights as float32 `[out_features, in_features]`, made anew: for model code that reads them itself."""
        return self.packed.dequantize()[0]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.packed.format.name}"
        )
