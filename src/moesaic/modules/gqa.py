"""Grouped-query attention of a decoder layer as a few native calls.

It covers the pre-norm families of `families`: projections with or without bias, norms of queries and keys per head or
over all heads, before or after the rotation, partial rotation, sinks and windows. It does not know the cache's class:
anything with the `update` of transformers works.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from moesaic.kernels import linear, linear_multi, ops
from moesaic.modules.families import RopeLayout
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm
from moesaic.modules.rotary import RotaryAngles

__all__ = ["GqaAttention"]

HeadNorm = Literal["none", "per_head", "per_head_after_rope", "all_heads"]
_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "query_layernorm", "key_layernorm"})


class GqaAttention:
    """Normalised hidden states in, output of the output projection out.

    Args:
        module: the stock attention module, its projections and norms replaced.
        rope_layout: see `families`.
        angles: of the model's rotary embedding.
    """

    def __init__(self, module: nn.Module, rope_layout: RopeLayout, angles: RotaryAngles) -> None:
        self.module, self.layer_idx = module, module.layer_idx
        self.projections = [module.q_proj.packed, module.k_proj.packed, module.v_proj.packed]
        self.biases = [module.q_proj.bias, module.k_proj.bias, module.v_proj.bias]
        self.output, self.output_bias = module.o_proj.packed, module.o_proj.bias
        self.head_dim, self.scaling = module.head_dim, module.scaling
        self.rope_layout: RopeLayout = rope_layout
        self.angles = angles
        self.sinks = getattr(module, "sinks", None)
        self.norm, q_norm, k_norm = _head_norms(module)
        self.q_norm, self.k_norm = (None, None) if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
        self.eps = 0.0 if q_norm is None else q_norm.eps

    @classmethod
    def of(cls, module: nn.Module, rope_layout: RopeLayout, angles: RotaryAngles) -> GqaAttention | None:
        """From a stock module whose weights are packed; None if it has parts that are not known here."""
        if any(name not in _CHILDREN for name, _ in module.named_children()):
            return None
        projections = [getattr(module, f"{part}_proj", None) for part in "qkvo"]
        if not all(isinstance(projection, PackedLinear) for projection in projections):
            return None
        if getattr(module.config, "clip_qkv", None) is not None:
            return None
        norms = [child for name, child in module.named_children() if "norm" in name]
        if not all(isinstance(norm, RMSNorm) for norm in norms):
            return None
        return cls(module, rope_layout, angles)

    def __call__(
        self, x: torch.Tensor, batch: int, positions: Any, mask: torch.Tensor | None, cache: Any | None
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: float32 `[batch * num_tokens, hidden_size]`, normalised.
            batch: rows of the batch.
            positions: the model's position embeddings.
            mask: see `attention`.
            cache: where keys and values go and come from, or None.

        Returns:
            float32 `[batch * num_tokens, hidden_size]`, in memory of its own.
        """
        query, key, value = (self._heads(part, batch) for part in linear_multi(x, self.projections, self.biases))
        self._norm_and_rotate(query, key, positions)
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
        return linear(attended.view(x.shape[0], -1), self.output, self.output_bias)

    def _heads(self, projected: torch.Tensor, batch: int) -> torch.Tensor:
        """`[batch * tokens, heads * head_dim]` as `[batch, heads, tokens, head_dim]`, without a copy."""
        num_tokens = projected.shape[0] // batch
        return projected.view(batch, num_tokens, -1, self.head_dim).transpose(1, 2)

    def _norm_and_rotate(self, query: torch.Tensor, key: torch.Tensor, positions: Any) -> None:
        cos, sin = self.angles(positions)
        ops.norm_and_rotate_(
            query,
            key,
            cos,
            sin,
            layout=self.rope_layout,
            norm=self.norm,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
        )


def _head_norms(module: nn.Module) -> tuple[HeadNorm, RMSNorm | None, RMSNorm | None]:
    if hasattr(module, "query_layernorm"):
        return "per_head_after_rope", module.query_layernorm, module.key_layernorm
    if not hasattr(module, "q_norm"):
        return "none", None, None
    per_head = module.q_norm.weight.shape[0] == module.head_dim
    return ("per_head" if per_head else "all_heads"), module.q_norm, module.k_norm
