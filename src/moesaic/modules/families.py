"""What the structure of a stock model does not tell about an architecture: the order of rotary pairs, and routing.

A model type that is listed here runs on fused forwards (`router`, `feed_forward`, `gqa`, `mla`, `decoder`). Any other
model type runs on the forwards of the model library, with packed weights, which is slower and needs no entry. What a
module's attributes tell (norms of queries and keys, biases, sinks, shared experts, scaling) is read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from moesaic.kernels.blocks import RouteOptions

__all__ = ["FAMILIES", "Family", "RopeLayout", "StockModule"]

StockModule = Any
"""A module of the model library: what attributes it has is its class's business, and checked where they are read."""

RopeLayout = Literal["half", "interleaved", "interleaved_to_half"]


@dataclass(frozen=True, slots=True)
class Family:
    """One or more model types.

    Attributes:
        routing: how logits become experts and weights (without the selection bias), given a stock router and the
            configuration.
        rope_layout: where the pairs of a rotated head lie, before and after, given the configuration.
        fuse_layers: whether a decoder layer is norm, attention, residual, norm, MLP, residual and nothing else.
    """

    routing: Callable[[StockModule, Any], RouteOptions]
    rope_layout: Callable[[Any], RopeLayout] = lambda config: "half"
    fuse_layers: bool = True


def _softmax(router: StockModule, config: Any) -> RouteOptions:
    # Routers that always renormalise (Mixtral, Hunyuan) have no such switch.
    return RouteOptions(router.top_k, "softmax", normalize=getattr(router, "norm_topk_prob", True))


def _softmax_of_chosen(router: StockModule, config: Any) -> RouteOptions:
    return RouteOptions(router.top_k, "softmax_of_chosen")


def _deepseek_v2(router: StockModule, config: Any) -> RouteOptions:
    if router.topk_method != "group_limited_greedy":
        return RouteOptions(router.top_k, "softmax", scale=router.routed_scaling_factor)
    return RouteOptions(
        router.top_k,
        "softmax",
        scale=router.routed_scaling_factor,
        group_score="maximum",
        num_groups=router.num_group,
        topk_groups=router.topk_group,
    )


def _deepseek_v3(router: StockModule, config: Any) -> RouteOptions:
    return RouteOptions(
        router.top_k,
        "sigmoid",
        normalize=router.norm_topk_prob,
        sum_offset=1e-20,
        scale=router.routed_scaling_factor,
        group_score="sum_of_two",
        num_groups=router.num_group,
        topk_groups=router.topk_group,
    )


def _minimax_m2(router: StockModule, config: Any) -> RouteOptions:
    return RouteOptions(router.top_k, "sigmoid", normalize=True)


def _ernie(router: StockModule, config: Any) -> RouteOptions:
    return RouteOptions(router.top_k, "softmax", normalize=True, sum_minimum=router.norm_min)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v2": Family(_deepseek_v2, lambda config: "interleaved"),
        "deepseek_v3": Family(_deepseek_v3, lambda config: "interleaved_to_half" if config.rope_interleave else "half"),
        "dots1": Family(_deepseek_v3),
        "ernie4_5_moe": Family(_ernie, lambda config: "interleaved"),
        "glm4_moe": Family(_deepseek_v3),
        "gpt_oss": Family(_softmax_of_chosen),
        "granitemoe": Family(_softmax_of_chosen),
        "hunyuan_v1_moe": Family(_softmax),
        "minimax_m2": Family(_minimax_m2),
        "mixtral": Family(_softmax),
        "olmoe": Family(_softmax),
        "qwen2_moe": Family(_softmax),
        "qwen3_moe": Family(_softmax),
        "qwen3_next": Family(_softmax, fuse_layers=False),
    }
)
