"""A dense MLP, or router, shared and routed experts, of a decoder layer on a GPU.

A dense MLP is one expert that every token chooses, as on the CPU, and so are shared experts. Routed experts go through
an `ExpertPath`: this module does not know where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moesaic.kernels.block_parts import RouteOptions
from moesaic.kernels.blocks import FeedForwardBlock
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore, SecondNorm, combine_norm
from moesaic.kernels.triton.elementwise import add_scaled_
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS
from moesaic.kernels.triton.norm import add_rms_norm
from moesaic.kernels.triton.route import Request, route, router_logits
from moesaic.kernels.triton.route import Routed as Chosen
from moesaic.modules.gpu.experts import ResidentExperts
from moesaic.modules.gpu.step import GpuStep, Routed
from moesaic.modules.gpu.weights import GpuLinear, GpuNorm

__all__ = ["GpuFeedForward"]


@dataclass(frozen=True, slots=True, eq=False)
class _Router:
    """Weights of a router, float32, and how its logits become experts."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    options: RouteOptions


class GpuFeedForward:
    """`x += residual_scale * (experts(norm(x)) + sigmoid(gate) * shared(norm(x)))`.

    Args:
        source: its equal on the CPU.
        device: the GPU.
        layer: position among the layers with routed experts; None: the MLP is dense.

    Attributes:
        routed: the routed experts on the CPU, or None for a dense MLP.
        logits_of: if set, makes the router's logits `[tokens, num_experts]` from its own, for benches of routing.
    """

    def __init__(self, source: FeedForwardBlock, device: torch.device, layer: int | None) -> None:
        self.layer = layer
        self.norm = GpuNorm.of(source.norm, device)
        self.scale = source.residual_scale
        self.routed: PackedExperts | None = None
        self.router: _Router | None = None
        self.logits_of: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.shared_gate: GpuLinear | None = None
        dense = source.shared
        if source.router is None or source.route is None:
            dense = source.experts
        else:
            self.routed = source.experts
            bias = source.route.bias
            options = replace(source.route, bias=None if bias is None else bias.to(device))
            logit_bias = source.router.bias
            self.router = _Router(
                source.router.weight.dequantize()[0].to(device),
                None if logit_bias is None else logit_bias.to(device),
                options,
            )
            if source.shared_gate is not None:
                self.shared_gate = GpuLinear.of(source.shared_gate, device)
        self.dense = None if dense is None else ResidentExperts.of(dense, device)

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is read before routed experts are chosen, in order."""
        return [self.norm.weight] if self.router is None else [self.norm.weight, self.router.weight]

    def __call__(
        self,
        x: torch.Tensor,
        attended: torch.Tensor,
        attended_scale: float,
        step: GpuStep,
        then: NormBefore | None = None,
        follows: GpuFeedForward | None = None,
    ) -> Lanes | None:
        """Add what attention gave, then update, float32 `[tokens, hidden_size]`, contiguous, in place.

        Args:
            x: what is updated.
            attended: like x.
            attended_scale: its factor.
            step: that this is part of.
            then: the norm of what follows, for few tokens.
            follows: the feed-forward block of the next layer.

        Returns:
            What follows reads, if `then` is given.
        """
        forecast = None
        if then is not None and follows is not None and follows.layer is not None:
            forecast = step.experts.forecast(follows.layer, len(x))
        if then is None or follows is None or forecast is None:
            return self._add(x, attended, attended_scale, step, then)
        likely = torch.empty_like(x)
        then = then._replace(second=SecondNorm(follows.norm.weight, follows.norm.eps, likely))
        lanes = self._add(x, attended, attended_scale, step, then)
        with forecast.beside(likely):
            follows.foretell(likely, step, forecast.request)
        return lanes

    def _add(
        self, x: torch.Tensor, attended: torch.Tensor, attended_scale: float, step: GpuStep, then: NormBefore | None
    ) -> Lanes | None:
        """As a call, that says nothing of the next layer."""
        normed = add_rms_norm(attended, x, self.norm.weight, self.norm.eps, scale=attended_scale)
        if self.router is None or self.layer is None:
            assert self.dense is not None
            dense = self.dense.of_all(normed)
            if then is not None:
                return combine_norm(x, dense, None, None, self.scale, None, then)
            add_scaled_(x, dense, self.scale)
            return None
        path = step.experts
        request = path.request(self.layer) if len(x) <= MAX_DECODE_TOKENS else None
        box_hidden = None if request is None else request.hidden
        logits = router_logits(normed, self.router.weight, self.router.bias, box_hidden=box_hidden)
        chosen = self._route(logits, step, request)
        misses = chosen.experts if chosen.misses is None else chosen.misses
        routed = Routed(self.layer, normed, chosen.experts, chosen.weights, chosen.slots, misses, request)
        path.start(routed)
        shared = None if self.dense is None else self.dense.of_all(normed)
        gate = None if self.shared_gate is None else self.shared_gate(normed)
        return path.finish(routed, x, shared, gate, self.scale, then)

    def foretell(self, likely: torch.Tensor, step: GpuStep, request: Request) -> None:
        """Say what the router would ask for if attention in front of it added nothing.

        Args:
            likely: float32 `[tokens, hidden_size]`, contiguous: the norm of what attention gets.
            step: that this is part of.
            request: where.
        """
        assert self.router is not None
        self._route(router_logits(likely, self.router.weight, self.router.bias), step, request)

    def _route(self, logits: torch.Tensor, step: GpuStep, request: Request | None) -> Chosen:
        """Choose by the router's logits, and ask."""
        assert self.router is not None and self.layer is not None
        return route(
            logits if self.logits_of is None else self.logits_of(logits),
            self.router.options,
            slot_of_expert=step.experts.table(self.layer),
            slot_mapping=step.input.slot_mapping,
            request=request,
        )
