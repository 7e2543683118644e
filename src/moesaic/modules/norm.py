"""RMSNorm through the native kernel, in place of the RMSNorm classes of the model library.

Every architecture has an RMSNorm class of its own, and a few of them multiply by `1 + weight`. Which one a class is
gets measured, not looked up: `from_stock` runs it once. This module knows no architecture by name.
"""

from __future__ import annotations

import torch
from torch import nn

from moesaic.kernels.ops import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467) over the last dimension.

    Args:
        weight: float32 `[dim]`, the factor itself (an offset of 1 is already added).
        eps: added to the mean square.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    @classmethod
    def from_stock(cls, stock: nn.Module) -> RMSNorm | None:
        """The equal of a loaded stock norm, or None if it is not an RMSNorm of one of the two known forms."""
        weight = getattr(stock, "weight", None)
        eps = getattr(stock, "variance_epsilon", getattr(stock, "eps", None))
        if "RMSNorm" not in type(stock).__name__ or "Gated" in type(stock).__name__:
            return None
        if weight is None or weight.ndim != 1 or not isinstance(eps, float) or getattr(stock, "bias", None) is not None:
            return None
        x = torch.linspace(-1.5, 2.0, weight.shape[0]).unsqueeze(0)
        expected = stock(x)
        for factor in (weight.detach(), weight.detach() + 1.0):
            if torch.allclose(torch.nn.functional.rms_norm(x, weight.shape, factor, eps), expected, 1e-5, 1e-6):
                return cls(factor.clone(), eps)
        return None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise float32 `[..., dim]`."""
        flat = hidden_states.reshape(-1, self.weight.shape[0])
        return rms_norm(flat, self.weight, self.eps).view(hidden_states.shape)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
