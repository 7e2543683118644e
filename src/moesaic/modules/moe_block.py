"""Feed-forward blocks on packed weights: a dense MLP, and a MoE block of router, routed experts and shared experts.

A dense MLP is one expert that every token chooses with weight 1, and shared experts are one that it chooses with weight
1 or with the sigmoid of a gate: one kernel serves all. This module knows modules by their field's names (`gate_proj`,
`shared_experts`), not by architecture.
"""

from __future__ import annotations

import torch
from torch import nn

from moesaic.kernels import PackedExperts, linear, moe_forward
from moesaic.modules.experts import RoutedExperts, activation_of
from moesaic.modules.families import Family
from moesaic.modules.linear import PackedLinear
from moesaic.modules.router import RouterForward

__all__ = ["DenseMlp", "MoeBlock", "feed_forward_of"]

_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")


class DenseMlp:
    """`down(act(gate(x)) * up(x))` of an MLP whose projections are packed."""

    def __init__(self, packed: PackedExperts) -> None:
        self.packed = packed
        self._index = torch.zeros(1, 1, dtype=torch.int64)
        self._ones = torch.ones(1, 1)

    @classmethod
    def of(cls, mlp: nn.Module, name: str) -> DenseMlp | None:
        """From a stock MLP whose projections have been replaced; None if it is of another structure."""
        projections = [getattr(mlp, f"{part}_proj", None) for part in ("gate", "up", "down")]
        if not all(isinstance(projection, PackedLinear) for projection in projections):
            return None
        weights = [projection.packed for projection in projections]
        biases = [None if p.bias is None else p.bias.unsqueeze(0) for p in projections]
        return cls(PackedExperts(*weights, *biases, activation=activation_of(mlp, name)))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 `[num_tokens, hidden]` to the same; each row times `weight [num_tokens, 1]` if given."""
        num_tokens = x.shape[0]
        if self._index.shape[0] != num_tokens:
            self._index = torch.zeros(num_tokens, 1, dtype=torch.int64)
            self._ones = torch.ones(num_tokens, 1)
        return moe_forward(x, self._index, self._ones if weight is None else weight, self.packed)


class MoeBlock:
    """Router, routed experts, and shared experts if there are any."""

    def __init__(
        self,
        router: RouterForward,
        experts: RoutedExperts,
        shared: DenseMlp | None,
        shared_gate: PackedLinear | None,
    ) -> None:
        self.router, self.experts, self.shared, self.shared_gate = router, experts, shared, shared_gate

    @classmethod
    def of(cls, block: nn.Module, family: Family, config: object, name: str) -> MoeBlock | None:
        """From a stock MoE block whose weights are packed; takes its router over. None if its structure is unknown."""
        experts = getattr(block, "experts", None)
        router = next((getattr(block, key) for key in _ROUTER_NAMES if hasattr(block, key)), None)
        shared_name = next((key for key in _SHARED_NAMES if getattr(block, key, None) is not None), None)
        shared_gate = getattr(block, "shared_expert_gate", None)
        known = {"experts", *_ROUTER_NAMES, *_SHARED_NAMES, "shared_expert_gate"}
        if not isinstance(experts, RoutedExperts) or router is None:
            return None
        if any(key not in known for key, _ in block.named_children()):
            return None
        shared = None if shared_name is None else DenseMlp.of(getattr(block, shared_name), f"{name}.{shared_name}")
        if (shared_name is not None and shared is None) or not isinstance(shared_gate, PackedLinear | None):
            return None
        forward = RouterForward.take_over(router, block, family.routing(router, config))
        return cls(forward, experts, shared, shared_gate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[num_tokens, hidden]` to the same."""
        _, weights, index = self.router(x)
        out = moe_forward(x, index, weights, self.experts.packed)
        if self.shared is not None:
            gate = self.shared_gate
            weight = None if gate is None else linear(x, gate.packed, gate.bias).sigmoid_()
            out.add_(self.shared(x, weight))
        return out


def feed_forward_of(block: nn.Module, family: Family, config: object, name: str) -> MoeBlock | DenseMlp | None:
    """The native form of a decoder layer's feed-forward block, or None if it has none."""
    return MoeBlock.of(block, family, config, name) or DenseMlp.of(block, name)
