"""The router of a MoE block through the native kernels: exact weights, one product, one choice of experts.

It takes over the forward of a stock router, whose module stays in the tree, so that hooks and recorders of router
logits keep working. It does not know which architecture it serves; `families` says how scores become weights.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import torch

from moesaic.kernels import PackedTensor, linear, ops
from moesaic.kernels.blocks import RouteOptions
from moesaic.modules.families import StockModule
from moesaic.quant import get_format

__all__ = ["RouterForward"]


class RouterForward:
    """Hidden states to experts and weights.

    Args:
        weight: packed in a float format `[num_experts, hidden_size]`.
        logit_bias: float32 `[num_experts]`, added to the logits, or None.
        options: how logits become experts and weights.
        experts_first: whether the stock block expects experts, weights and logits in this order.
    """

    def __init__(
        self,
        weight: PackedTensor,
        logit_bias: torch.Tensor | None,
        options: RouteOptions,
        experts_first: bool = False,
    ) -> None:
        self.weight, self.logit_bias, self.options = weight, logit_bias, options
        self.experts_first = experts_first

    @classmethod
    def take_over(cls, router: StockModule, block: StockModule, options: RouteOptions) -> RouterForward:
        """Replace the forward of a loaded stock router; its weight moves into a packed float32 matrix.

        Args:
            router: the stock router.
            block: the MoE block that it belongs to, which may own the correction bias.
            options: see `families`; the selection bias is added here.

        Returns:
            The new forward, or the one that it has if it was taken over before.
        """
        if isinstance(router.forward, RouterForward):
            return router.forward
        owner = router if getattr(router, "weight", None) is not None else router.wg
        experts_first = _returns_experts_first(router, owner.weight)
        values = owner.weight.detach().float().contiguous()
        weight = PackedTensor.empty(get_format("F32"), *values.shape)
        weight.pack_(0, values.numpy().view("uint8"))
        owner.weight = None  # one copy
        options = replace(options, bias=_choice_bias(router, block))
        forward = cls(weight, _float_or_none(getattr(owner, "bias", None)), options, experts_first)
        router.forward = forward
        return forward

    def __call__(
        self, hidden_states: torch.Tensor, *unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route float32 `[..., hidden_size]`.

        Args:
            hidden_states: float32, any leading dimensions.
            unused: a correction bias that some blocks pass and that is already held here.

        Returns:
            Logits `[num_tokens, num_experts]`, weights float32 and experts int64 `[num_tokens, num_experts_per_tok]`,
            or the reverse where the stock router does that.
        """
        flat = hidden_states.reshape(-1, self.weight.cols)
        logits = linear(flat, self.weight, self.logit_bias)
        options = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        weights, index = ops.route(logits, **options)
        return (index, weights, logits) if self.experts_first else (logits, weights, index)


def _returns_experts_first(router: StockModule, weight: torch.Tensor) -> bool:
    """The order of a stock router's results, which differs between versions of one class (Granite), by asking it."""
    if len(inspect.signature(router.forward).parameters) > 1:  # takes a correction bias too: such routers do not differ
        return False
    with torch.no_grad():
        first = router(torch.zeros(1, weight.shape[1], dtype=weight.dtype))[0]
    return not first.is_floating_point()


def _choice_bias(router: StockModule, block: StockModule) -> torch.Tensor | None:
    """The selection bias, wherever the architecture keeps it."""
    for owner in (router, getattr(router, "moe_statics", None), block):
        bias = getattr(owner, "e_score_correction_bias", None)
        if bias is not None:
            return torch.as_tensor(bias).detach().float().flatten().contiguous()
    return None


def _float_or_none(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()
