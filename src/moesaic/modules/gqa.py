"""Grouped-query attention of a decoder layer, with the norm in front of it and the residual around it.

It covers the pre-norm families of `families`: projections with or without bias, norms of queries and keys per head or
over all heads, before or after the rotation, partial rotation, sinks and windows. On a growing cache all of it is one
native call; any other cache with the `update` of transformers works too, in a handful of calls. `GqaParts` is what a
stock module consists of, wherever it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.kernels import linear, linear_multi, ops
from moesaic.kernels.blocks import AttentionBlock, Linear, Norm
from moesaic.kvcache import GrowingCache, GrowingLayer
from moesaic.modules.families import RopeLayout, StockModule
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm
from moesaic.modules.rotary import RotaryAngles

__all__ = ["GqaAttention", "GqaParts"]

_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "query_layernorm", "key_layernorm"})


@dataclass(frozen=True, slots=True, eq=False)
class GqaParts:
    """What a stock module of grouped-query attention consists of.

    Attributes:
        layer_idx: the decoder layer.
        norm: of its input.
        projections: of queries, keys and values.
        output: the last matrix.
        output_gate: whether the projection of queries gives, head by head, a query and as many numbers whose sigmoid
            multiplies what the head attended to.
        head_dim: of queries and keys.
        scaling: of products of queries and keys.
        rope_layout: see `families`.
        head_norm: which norm queries and keys get, see `ops.norm_and_rotate_`.
        q_norm: its weights for queries.
        k_norm: its weights for keys.
        sinks: float32 `[heads]`, or None.
        residual_scale: factor of what is added to the residual.
    """

    layer_idx: int
    norm: Norm
    projections: tuple[Linear, Linear, Linear]
    output: Linear
    output_gate: bool
    head_dim: int
    scaling: float
    rope_layout: RopeLayout
    head_norm: str
    q_norm: Norm | None
    k_norm: Norm | None
    sinks: torch.Tensor | None
    residual_scale: float

    @classmethod
    def of(
        cls, module: StockModule, norm: StockModule, rope_layout: RopeLayout, residual_scale: float
    ) -> GqaParts | None:
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
        q, k, v, output = (Linear(p.packed, p.bias) for p in projections if p is not None)
        head_norm, q_norm, k_norm = _head_norms(module)
        return cls(
            layer_idx=module.layer_idx,
            norm=Norm(norm.weight, norm.eps),
            projections=(q, k, v),
            output=output,
            output_gate=q.weight.rows == 2 * output.weight.cols,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rope_layout=rope_layout,
            head_norm=head_norm,
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=getattr(module, "sinks", None),
            residual_scale=residual_scale,
        )


class GqaAttention:
    """`x + residual_scale * attention(norm(x))`.

    Args:
        module: the stock attention module, its projections and norms replaced.
        parts: what it consists of, without an output gate.
        angles: of the model's rotary embedding.
    """

    def __init__(self, module: StockModule, parts: GqaParts, angles: RotaryAngles) -> None:
        self.module, self.parts, self.angles = module, parts, angles
        self.layer_idx = parts.layer_idx
        q, k, v = parts.projections
        self.block = AttentionBlock(
            norm=parts.norm,
            q=q,
            k=k,
            v=v,
            o=parts.output,
            head_dim=parts.head_dim,
            num_pairs=angles.num_pairs,
            scale=parts.scaling,
            rope_layout=parts.rope_layout,
            head_norm=parts.head_norm,
            q_norm=parts.q_norm,
            k_norm=parts.k_norm,
            sinks=parts.sinks,
            residual_scale=parts.residual_scale,
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
        parts = GqaParts.of(module, norm, rope_layout, residual_scale)
        return None if parts is None or parts.output_gate else cls(module, parts, angles)

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
        return layer.reserve(x, self.block.kv_heads, self.parts.head_dim, self.parts.head_dim)

    def _through_update(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None, cache: Any | None
    ) -> torch.Tensor:
        """The same with a cache of another kind, or none."""
        parts = self.parts
        normed = ops.rms_norm(x, parts.norm.weight, parts.norm.eps).view(-1, x.shape[-1])
        weights, biases = [p.weight for p in parts.projections], [p.bias for p in parts.projections]
        projected = linear_multi(normed, weights, biases)
        query, key, value = (part.view(*x.shape[:2], -1, parts.head_dim).transpose(1, 2) for part in projected)
        ops.norm_and_rotate_(
            query,
            key,
            cos,
            sin,
            layout=parts.rope_layout,
            norm=parts.head_norm,
            q_norm=None if parts.q_norm is None else parts.q_norm.weight,
            k_norm=None if parts.k_norm is None else parts.k_norm.weight,
            eps=0.0 if parts.q_norm is None else parts.q_norm.eps,
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended = ops.attention(
            query,
            key,
            value,
            scale=parts.scaling,
            causal_offset=key.shape[2] - query.shape[2] if mask is None else None,
            mask=mask,
            sinks=parts.sinks,
        )
        out = linear(attended.view(len(normed), -1), parts.output.weight, parts.output.bias).view(x.shape)
        return ops.add_scaled_(x.clone(), out, parts.residual_scale)


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
