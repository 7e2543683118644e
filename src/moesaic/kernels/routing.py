"""Router logits to experts and weights on the CPU; see csrc/ops/route.h. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, choice, vector_address

__all__ = ["GROUP_SCORES", "ROUTE_SCORES", "route"]

ROUTE_SCORES: Mapping[str, int] = MappingProxyType(
    {
        "softmax": _native.RouteScore.SOFTMAX.value,
        "sigmoid": _native.RouteScore.SIGMOID.value,
        "softmax_of_chosen": _native.RouteScore.SOFTMAX_OF_CHOSEN.value,
    }
)
GROUP_SCORES: Mapping[str, int] = MappingProxyType(
    {
        "none": _native.GroupScore.NONE.value,
        "sum_of_two": _native.GroupScore.SUM_OF_TWO.value,
        "maximum": _native.GroupScore.MAXIMUM.value,
    }
)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    group_score: str = "none",
    num_groups: int = 1,
    topk_groups: int = 1,
    normalize: bool = False,
    sum_offset: float = 0.0,
    sum_minimum: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts for each token.

    The chosen experts come best first. Of experts with the same score the one with the lower index comes first
    (torch.topk leaves that open), and a NaN counts as the largest, as in torch.topk.

    Args:
        logits: float32 `[num_tokens, num_experts]`.
        top_k: experts per token.
        score: of an expert: "softmax" over all, "sigmoid", or "softmax_of_chosen": by logits, softmax over these.
        bias: float32 `[num_experts]`, added to the scores for the choice only.
        group_score: "sum_of_two" (DeepSeek-V3) or "maximum" (DeepSeek-V2) if only the best groups are eligible.
        num_groups: groups of neighbouring experts, all of one size.
        topk_groups: groups that are eligible.
        normalize: divide the weights of a token by `max(sum + sum_offset, sum_minimum)`.
        sum_offset: see normalize.
        sum_minimum: see normalize.
        scale: factor of the weights, last.

    Returns:
        Weights float32 and experts int64, both `[num_tokens, top_k]`.

    Raises:
        KernelError: shapes, types or numbers that do not go together.
    """
    check_float("logits", logits, 2)
    num_tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts <= _native.MAX_ROUTE_EXPERTS:
        raise KernelError(
            f"top_k is {top_k} of {num_experts} experts: expected 1 <= top_k <= experts <= {_native.MAX_ROUTE_EXPERTS}."
        )
    if num_groups < 1 or num_experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise KernelError(
            f"{topk_groups} of {num_groups} groups of {num_experts} experts: expected equal groups and "
            "1 <= topk_groups <= num_groups."
        )
    weights = torch.empty(num_tokens, top_k)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64)
    _native.route(
        logits.data_ptr(),
        logits.stride(0),
        num_tokens,
        num_experts,
        top_k,
        choice("score", score, ROUTE_SCORES),
        vector_address("bias", bias, num_experts),
        choice("group_score", group_score, GROUP_SCORES),
        num_groups,
        topk_groups,
        normalize,
        sum_offset,
        sum_minimum,
        scale,
        indices.data_ptr(),
        weights.data_ptr(),
    )
    return weights, indices
