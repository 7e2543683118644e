"""Grouped-query attention of a decoder layer, with the norm in front of it and the residual around it.

It covers the pre-norm families of `families`: projections with or without bias, norms of queries and keys per head or
over all heads, before or after the rotation, partial rotation, sinks and windows. On a growing cache all of it is one
native call; any other cache with the `update` of transformers works too, in a handful of calls.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.kernels import linear, linear_multi, ops
from moesaic.kernels.blocks import AttentionBlock, Linear, Norm
from moesaic.kvcache import GrowingCache, GrowingLayer
from moesaic.modules.families import RopeLayout, StockModule
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm
from moesaic.modules.rotary import RotaryAngles

__all__ = ["GqaAttention"]

_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "query_layernorm", "key_layernorm"})


class GqaAttention:
    """`x + residual_scale * attention(norm(x))`.

    Args:
        module: the stock attention module, its projections and norms replaced.
        norm: of its input.
        rope_layout: see `families`.
        angles: of the model's rotary embedding.
        residual_scale: factor of what is added to x.
    """

    def __init__(
        self, module: StockModule, norm: RMSNorm, rope_layout: RopeLayout, angles: RotaryAngles, residual_scale: float
    ) -> None:
        self.module, self.layer_idx, self.angles = module, module.layer_idx, angles
        self.projections = [Linear(p.packed, p.bias) for p in (module.q_proj, module.k_proj, module.v_proj)]
        self.output = Linear(module.o_proj.packed, module.o_proj.bias)
        self.norm, self.residual_scale = Norm(norm.weight, norm.eps), residual_scale
        self.head_dim, self.scaling, self.rope_layout = module.head_dim, module.scaling, rope_layout
        self.sinks = getattr(module, "sinks", None)
        self.head_norm, self.q_norm, self.k_norm = _head_norms(module)
        q, k, v = self.projections
        self.block = AttentionBlock(
            norm=self.norm,
            q=q,
            k=k,
            v=v,
            o=self.output,
            head_dim=self.head_dim,
            num_pairs=angles.num_pairs,
            scale=self.scaling,
            rope_layout=rope_layout,
            head_norm=self.head_norm,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            sinks=self.sinks,
            residual_scale=residual_scale,
        )

    @classmethod
    def of(
        cls,
        module: StockModule,
        norm: StockModule,
        rope_layout: RopeLayout,
        angles: RotaryAngles,
        residual_scale: float,
    ) -> GqaAttention | None:
        """From a stock module whose weights are packed; None if it has parts that are not known here."""
        if any(name not in _CHILDREN for name, _ in module.named_children()):
            return None
        projections = [getattr(module, f"{part}_proj", None) for part in "qkvo"]
        if not all(isinstance(projection, PackedLinear) for projection in projections):
            return None
        if getattr(module.config, "clip_qkv", None) is not None:
            return None
        norms = [norm, *(child for name, child in module.named_children() if "norm" in name)]
        if not all(isinstance(norm, RMSNorm) for norm in norms):
            return None
        return cls(module, norm, rope_layout, angles, residual_scale)

    def __call__(self, x: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any | None) -> torch.Tensor:
        """Attend.

        Args:
            x: float32 `[batch, num_tokens, hidden_size]`.
            positions: the model's position embeddings.
            mask: see `attention`.
            cache: where keys and values go and come from, or None.

        Returns:
            float32 `[batch, num_tokens, hidden_size]`, in memory of its own.
        """
        cos, sin = self.angles(positions)
        layer = self.growing_layer(x, cache)
        if layer is None:
            return self._through_update(x, cos, sin, mask, cache)
        keys, values, num_past = self.reserve(x, layer)
        out = self.block(x.contiguous(), cos, sin, keys, values, num_past, mask)
        layer.advance(x.shape[1])
        return out

    def growing_layer(self, x: torch.Tensor, cache: Any | None) -> GrowingLayer | None:
        """The layer of a cache on which `block` serves; None if it does not."""
        layer = cache.layers[self.layer_idx] if isinstance(cache, GrowingCache) else None
        return layer if isinstance(layer, GrowingLayer) else None

    def reserve(self, x: torch.Tensor, layer: GrowingLayer) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys and values with room for those of x, and how many are there."""
        return layer.reserve(x, self.block.kv_heads, self.head_dim, self.head_dim)

    def _through_update(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None, cache: Any | None
    ) -> torch.Tensor:
        """The same with a cache of another kind, or none."""
        normed = ops.rms_norm(x, self.norm.weight, self.norm.eps).view(-1, x.shape[-1])
        weights, biases = [p.weight for p in self.projections], [p.bias for p in self.projections]
        projected = linear_multi(normed, weights, biases)
        query, key, value = (part.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for part in projected)
        ops.norm_and_rotate_(
            query,
            key,
            cos,
            sin,
            layout=self.rope_layout,
            norm=self.head_norm,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended = ops.attention(
            query,
            key,
            value,
            scale=self.scaling,
            causal_offset=key.shape[2] - query.shape[2] if mask is None else None,
            mask=mask,
            sinks=self.sinks,
        )
        out = linear(attended.view(len(normed), -1), self.output.weight, self.output.bias).view(x.shape)
        return ops.add_scaled_(x.clone(), out, self.residual_scale)


def _head_norms(module: StockModule) -> tuple[str, Norm | None, Norm | None]:
    """Which norm queries and keys get, and its weights."""
    if hasattr(module, "query_layernorm"):
        kind, q_norm, k_norm = "per_head_after_rope", module.query_layernorm, module.key_layernorm
    elif hasattr(module, "q_norm"):
        per_head = module.q_norm.weight.shape[0] == module.head_dim
        kind, q_norm, k_norm = ("per_head" if per_head else "all_heads"), module.q_norm, module.k_norm
    else:
        return "none", None, None
    return kind, Norm(q_norm.weight, q_norm.eps), Norm(k_norm.weight, k_norm.eps)
