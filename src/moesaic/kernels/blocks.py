"""The two halves of a pre-norm decoder layer on the CPU, each as one native call; see csrc/blocks.h.

A block is described and checked once, when a model is loaded; a call checks what changes. The arithmetic is that of the
functions in `cpu` and `ops`. It knows no model and no cache but its tensors.
"""

from __future__ import annotations

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import choice, describe, vector_address
from moesaic.kernels.attention_blocks import AttentionBlock, LatentAttentionBlock
from moesaic.kernels.block_parts import NO_MATRIX, HeadLinears, Linear, Norm, RouteOptions
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.routing import GROUP_SCORES, ROUTE_SCORES

__all__ = [
    "AttentionBlock",
    "FeedForwardBlock",
    "HeadLinears",
    "LatentAttentionBlock",
    "Linear",
    "Norm",
    "RouteOptions",
]


class FeedForwardBlock:
    """`x + residual_scale * (experts(norm(x)) + sigmoid(gate) * shared(norm(x)))`, in place.

    Args:
        norm: of the input.
        experts: the routed experts; or a dense MLP as one expert, without a router.
        router: `[num_experts, hidden]`, or None for a dense MLP.
        route: how its logits become experts and weights; with a router only.
        shared: shared experts as one expert, or None.
        shared_gate: `[1, hidden]`, whose sigmoid is the weight of the shared experts; None: weight 1.
        residual_scale: factor of what is added to x.

    Raises:
        KernelError: sizes do not go together.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        experts: PackedExperts,
        router: Linear | None = None,
        route: RouteOptions | None = None,
        shared: PackedExperts | None = None,
        shared_gate: Linear | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        num_experts, hidden = experts.num_experts, experts.hidden
        if (router is None) != (route is None) or (router is None and num_experts != 1):
            raise KernelError(f"{num_experts} experts, router {router}, route {route}: expected both or one expert.")
        if router is not None and router.weight.rows != num_experts:
            raise KernelError(f"The router has {router.weight.rows} rows: expected {num_experts}, one per expert.")
        if shared is not None and (shared.num_experts, shared.hidden) != (1, hidden):
            raise KernelError(f"{shared.num_experts} shared experts of {shared.hidden}: expected 1 of {hidden}.")
        if shared_gate is not None and (shared is None or shared_gate.weight.rows != 1):
            raise KernelError("The shared experts' gate needs shared experts, and one row.")
        options = route or RouteOptions(1)
        if not 1 <= options.top_k <= num_experts <= _native.MAX_ROUTE_EXPERTS:
            raise KernelError(f"top_k is {options.top_k} of {num_experts} experts.")
        if num_experts % options.num_groups or not 1 <= options.topk_groups <= options.num_groups:
            raise KernelError(f"{options.topk_groups} of {options.num_groups} groups of {num_experts} experts.")
        self.hidden = hidden
        # The native block holds addresses into these.
        self.norm, self.experts, self.router, self.route = norm, experts, router, route
        self.shared, self.shared_gate, self.residual_scale = shared, shared_gate, residual_scale
        self.block = _native.FeedForwardBlock(
            norm.arguments("norm", hidden),
            NO_MATRIX if router is None else router.arguments("router", hidden),
            options.top_k,
            choice("score", options.score, ROUTE_SCORES),
            vector_address("bias", options.bias, num_experts),
            choice("group_score", options.group_score, GROUP_SCORES),
            options.num_groups,
            options.topk_groups,
            options.normalize,
            options.sum_offset,
            options.sum_minimum,
            options.scale,
            experts.handle,
            None if shared is None else shared.handle,
            NO_MATRIX if shared_gate is None else shared_gate.arguments("shared_gate", hidden),
            residual_scale,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Update float32 `[..., hidden]`, contiguous, in place, and return it.

        Raises:
            KernelError: x has another shape, type or layout than that.
        """
        if x.dtype != torch.float32 or x.shape[-1] != self.hidden or not x.is_cpu or not x.is_contiguous():
            raise KernelError(f"x is {describe(x)}: expected float32 [..., {self.hidden}] on the CPU, contiguous.")
        self.block(x.data_ptr(), x.numel() // self.hidden)
        return x
