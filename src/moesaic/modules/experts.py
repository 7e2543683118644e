"""Routed experts on packed weights, with the uniform experts interface of transformers 5.

It knows what a stock experts module says about itself (its activation, limits and layout flags), not the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from moesaic.errors import UnsupportedModelError
from moesaic.kernels import Activation, PackedExperts, moe_forward
from moesaic.kernels.experts import ActivationName

__all__ = ["RoutedExperts", "activation_of"]

# Class of the stock activation module, or name of the function -> the kernel's name of it.
_ACTIVATIONS: Mapping[str, ActivationName] = MappingProxyType(
    {
        "SiLUActivation": "silu",
        "SiLU": "silu",
        "GELUActivation": "gelu",
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "ReLU": "relu",
        "ReLUSquaredActivation": "relu2",
        "silu": "silu",
        "gelu": "gelu",
        "relu": "relu",
    }
)


def activation_of(experts: nn.Module, name: str) -> Activation:
    """What a stock experts module applies between its projections.

    Args:
        experts: the stock module; its parameters may be on the meta device.
        name: its qualified name, for the message.

    Raises:
        UnsupportedModelError: the kernels do not have it.
    """
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if alpha is not None and limit is not None:
        return Activation("swiglu_oai", alpha=float(alpha), limit=float(limit))
    function = getattr(experts, "act_fn", None)
    act_fn = getattr(function, "__name__", type(function).__name__)
    if act_fn not in _ACTIVATIONS or limit is not None:
        raise UnsupportedModelError(
            f"{name}: the experts' activation {act_fn} is none that the kernels have ({', '.join(_ACTIVATIONS)}); "
            "a placement rule with 'implementation: transformers' keeps these experts in the stock implementation."
        )
    return Activation(_ACTIVATIONS[act_fn])


class RoutedExperts(nn.Module):
    """The routed experts of one layer.

    Args:
        packed: projections of all experts; not Parameters, so that nothing casts or moves them.
    """

    def __init__(self, packed: PackedExperts) -> None:
        super().__init__()
        self.packed = packed
        self.num_experts = packed.up.num_matrices

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            hidden_states: float32 `[num_tokens, hidden_size]`.
            top_k_index: int64 `[num_tokens, num_experts_per_tok]`, each in `[0, num_experts)`.
            top_k_weights: float32 `[num_tokens, num_experts_per_tok]`.

        Returns:
            float32 `[num_tokens, hidden_size]`.
        """
        return moe_forward(hidden_states, top_k_index, top_k_weights, self.packed)

    def extra_repr(self) -> str:
        parts = {"gate": self.packed.gate, "up": self.packed.up, "down": self.packed.down}
        formats = ", ".join(f"{key}={part.format.name}" for key, part in parts.items() if part is not None)
        return f"num_experts={self.num_experts}, {formats}, activation={self.packed.activation.name}"
