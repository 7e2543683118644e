"""Feed-forward blocks on packed weights: a dense MLP, or router, routed and shared experts, in one native call.

A dense MLP is one expert that every token chooses, and so are shared experts, perhaps weighted by a sigmoid gate.
This module knows modules by their field's names (`gate_proj`, `shared_experts`), not by architecture.
"""

from __future__ import annotations

from typing import Any

from moesaic.kernels import PackedExperts
from moesaic.kernels.blocks import FeedForwardBlock, Linear, Norm
from moesaic.modules.experts import RoutedExperts, activation_of
from moesaic.modules.families import Family, StockModule
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm
from moesaic.modules.router import RouterForward

__all__ = ["feed_forward_block"]

_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
_CHILDREN = frozenset({"experts", *_ROUTER_NAMES, *_SHARED_NAMES, "shared_expert_gate"})


def feed_forward_block(
    block: StockModule, norm: StockModule, family: Family, config: Any, residual_scale: float, name: str
) -> FeedForwardBlock | None:
    """The native form of a stock MLP or MoE block with the norm in front of it and the residual around it.

    Args:
        block: its weights are packed. If it is a MoE block, its router is taken over, fused or not.
        norm: of its input.
        family: how it routes.
        config: the model's configuration.
        residual_scale: factor of what is added to the residual.
        name: qualified name of the block.

    Returns:
        The block, or None if its structure or its norm is not known here.
    """
    if not hasattr(block, "experts"):
        dense = _dense(block, name)
        return (
            None
            if dense is None or not isinstance(norm, RMSNorm)
            else FeedForwardBlock(norm=Norm(norm.weight, norm.eps), experts=dense, residual_scale=residual_scale)
        )
    router = next((getattr(block, key) for key in _ROUTER_NAMES if hasattr(block, key)), None)
    if not isinstance(block.experts, RoutedExperts) or router is None:
        return None
    forward = RouterForward.take_over(router, block, family.routing(router, config))
    shared_name = next((key for key in _SHARED_NAMES if getattr(block, key, None) is not None), None)
    shared = None if shared_name is None else _dense(getattr(block, shared_name), f"{name}.{shared_name}")
    shared_gate = getattr(block, "shared_expert_gate", None)
    if any(key not in _CHILDREN for key, _ in block.named_children()) or not isinstance(norm, RMSNorm):
        return None
    if (shared is None) != (shared_name is None) or not isinstance(shared_gate, PackedLinear | None):
        return None
    return FeedForwardBlock(
        norm=Norm(norm.weight, norm.eps),
        experts=block.experts.packed,
        router=Linear(forward.weight, forward.logit_bias),
        route=forward.options,
        shared=shared,
        shared_gate=None if shared_gate is None else Linear(shared_gate.packed, shared_gate.bias),
        residual_scale=residual_scale,
    )


def _dense(mlp: StockModule, name: str) -> PackedExperts | None:
    """A stock MLP whose projections are packed, as one expert; None if it is of another structure."""
    projections = [getattr(mlp, f"{part}_proj", None) for part in ("gate", "up", "down")]
    packed = [projection for projection in projections if isinstance(projection, PackedLinear)]
    if len(packed) != len(projections):
        return None
    gate, up, down = (projection.packed for projection in packed)
    gate_bias, up_bias, down_bias = (None if p.bias is None else p.bias.unsqueeze(0) for p in packed)
    return PackedExperts(gate, up, down, gate_bias, up_bias, down_bias, activation_of(mlp, name))
