"""The two halves of a pre-norm decoder layer on the CPU, each as one native call; see csrc/blocks.h.

A block is described and checked once, when a model is loaded; a call checks what changes. The arithmetic is that of the
functions in `cpu` and `ops`. It knows no model and no cache but its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, choice, describe, vector_address
from moesaic.kernels.attention import cache_type, full_mask, mask_arguments
from moesaic.kernels.ops import HEAD_NORMS, ROPE_LAYOUTS, check_angles
from moesaic.kernels.packed import PackedExperts, PackedTensor
from moesaic.kernels.routing import GROUP_SCORES, ROUTE_SCORES

__all__ = ["AttentionBlock", "FeedForwardBlock", "Linear", "Norm", "RouteOptions"]

_NO_MATRIX = (0, 0, 0, 0, 0)
_NO_NORM = (0, 0.0)


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed matrix and its bias, float32 `[rows]`."""

    weight: PackedTensor
    bias: torch.Tensor | None = None

    def arguments(self, name: str, cols: int) -> tuple[int, int, int, int, int]:
        """What the extension has to know of it.

        Raises:
            KernelError: it has another number of columns than `cols`, or its bias does not fit.
        """
        w = self.weight
        if w.cols != cols:
            raise KernelError(f"{name} has {w.cols} columns: expected {cols}.")
        return w.format.ggml_type, w.address(), w.rows, cols, vector_address(f"{name}'s bias", self.bias, w.rows)


@dataclass(frozen=True, slots=True)
class Norm:
    """Weights of an RMS norm, float32 `[width]`, and what is added to the mean square."""

    weight: torch.Tensor
    eps: float

    def arguments(self, name: str, width: int) -> tuple[int, float]:
        """What the extension has to know of it; KernelError if it is not `width` wide."""
        return vector_address(name, self.weight, width), self.eps


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How router logits become experts and weights; see `ops.route`."""

    top_k: int
    score: str = "softmax"
    bias: torch.Tensor | None = None
    group_score: str = "none"
    num_groups: int = 1
    topk_groups: int = 1
    normalize: bool = False
    sum_offset: float = 0.0
    sum_minimum: float = 0.0
    scale: float = 1.0


class AttentionBlock:
    """`x + residual_scale * o(attention(norm(x)))` of grouped-query attention with rotary positions.

    Args:
        norm: of the input.
        q: `[heads * head_dim, hidden]`.
        k: `[kv_heads * head_dim, hidden]`.
        v: as k.
        o: `[hidden, heads * head_dim]`.
        head_dim: width of a head.
        num_pairs: rotary pairs of a head.
        scale: factor of the scores.
        rope_layout: see `ops.norm_and_rotate_`.
        head_norm: see `ops.norm_and_rotate_`.
        q_norm: norm of the heads of queries, unless head_norm is "none".
        k_norm: the same of keys.
        sinks: float32 `[heads]`; see `ops.attention`.
        residual_scale: factor of what is added to x.

    Raises:
        KernelError: sizes do not go together.
    """

    def __init__(
        self,
        *,
        norm: Norm,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        head_dim: int,
        num_pairs: int,
        scale: float,
        rope_layout: str = "half",
        head_norm: str = "none",
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        sinks: torch.Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        hidden = q.weight.cols
        heads, kv_heads = q.weight.rows // head_dim, k.weight.rows // head_dim
        if heads * head_dim != q.weight.rows or kv_heads * head_dim != k.weight.rows or heads % kv_heads:
            raise KernelError(f"q has {q.weight.rows} rows and k {k.weight.rows}: expected whole heads of {head_dim}.")
        if v.weight.rows != k.weight.rows or o.weight.rows != hidden:
            raise KernelError(f"v has {v.weight.rows} rows and o {o.weight.rows}: expected {k.weight.rows}, {hidden}.")
        if not 0 <= 2 * num_pairs <= head_dim or num_pairs > _native.MAX_ROTARY_PAIRS:
            raise KernelError(f"{num_pairs} rotary pairs in heads of {head_dim}.")
        q_width, k_width = (heads * head_dim, kv_heads * head_dim) if head_norm == "all_heads" else (head_dim, head_dim)
        if (head_norm != "none") != (q_norm is not None and k_norm is not None):
            raise KernelError(f"head_norm is '{head_norm}', which does not go with the norms given.")
        self.hidden, self.heads, self.kv_heads = hidden, heads, kv_heads
        self.head_dim, self.num_pairs = head_dim, num_pairs
        self._owners = (norm, q, k, v, o, q_norm, k_norm, sinks)  # the block holds addresses into these
        self._block = _native.AttentionBlock(
            norm.arguments("norm", hidden),
            q.arguments("q", hidden),
            k.arguments("k", hidden),
            v.arguments("v", hidden),
            o.arguments("o", heads * head_dim),
            heads,
            kv_heads,
            head_dim,
            choice("head_norm", head_norm, HEAD_NORMS),
            _NO_NORM if q_norm is None else q_norm.arguments("q_norm", q_width),
            _NO_NORM if k_norm is None else k_norm.arguments("k_norm", k_width),
            choice("rope_layout", rope_layout, ROPE_LAYOUTS),
            num_pairs,
            scale,
            vector_address("sinks", sinks, heads),
            residual_scale,
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        num_past: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the keys and values of x to the cache, and attend.

        Args:
            x: float32 `[batch, num_tokens, hidden]`, contiguous.
            cos: float32 `[batch or 1, num_tokens, num_pairs]`, any strides.
            sin: like cos.
            keys: float32, bfloat16 or float16 `[batch, kv_heads, capacity, head_dim]`: the keys of num_past tokens and
                room for num_tokens more.
            values: like keys, of the same type.
            num_past: tokens in the cache.
            mask: None: causal; or as in `ops.attention`, for num_past + num_tokens keys, causality included.

        Returns:
            float32 `[batch, num_tokens, hidden]`, in memory of its own.

        Raises:
            KernelError: a tensor has another shape, type or layout than said here.
        """
        check_float("x", x, 3)
        batch, num_tokens, hidden = x.shape
        if hidden != self.hidden or not x.is_contiguous():
            raise KernelError(f"x is {describe(x)}: expected [batch, num_tokens, {self.hidden}], contiguous.")
        check_angles(cos, sin, batch, num_tokens, self.head_dim)
        if cos.shape[2] != self.num_pairs:
            raise KernelError(f"cos is {describe(cos)}: expected {self.num_pairs} pairs.")
        capacity = keys.shape[2]
        if not 0 <= num_past <= capacity - num_tokens:
            raise KernelError(f"{num_past} tokens in a cache for {capacity}: no room for {num_tokens} more.")
        shape = (batch, self.kv_heads, capacity, self.head_dim)
        kind = cache_type("keys", keys, shape, keys.dtype)
        cache_type("values", values, shape, keys.dtype)
        mask = full_mask(mask, batch, self.heads, num_tokens, num_past + num_tokens)
        angle_strides = cos.stride()
        out = torch.empty(batch, num_tokens, hidden)
        self._block(
            x.data_ptr(),
            batch,
            num_tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            angle_strides if cos.shape[0] == batch else (0, *angle_strides[1:]),
            keys.data_ptr(),
            keys.stride(),
            values.data_ptr(),
            values.stride(),
            kind,
            num_past,
            *mask_arguments(mask),
            out.data_ptr(),
        )
        return out


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
        self._owners = (norm, experts, router, route, shared, shared_gate)  # the block holds addresses into these
        self._block = _native.FeedForwardBlock(
            norm.arguments("norm", hidden),
            _NO_MATRIX if router is None else router.arguments("router", hidden),
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
            _NO_MATRIX if shared_gate is None else shared_gate.arguments("shared_gate", hidden),
            residual_scale,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Update float32 `[..., hidden]`, contiguous, in place, and return it.

        Raises:
            KernelError: x has another shape, type or layout than that.
        """
        if x.dtype != torch.float32 or x.shape[-1] != self.hidden or not x.is_cpu or not x.is_contiguous():
            raise KernelError(f"x is {describe(x)}: expected float32 [..., {self.hidden}] on the CPU, contiguous.")
        self._block(x.data_ptr(), x.numel() // self.hidden)
        return x
