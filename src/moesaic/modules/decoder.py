"""A decoder layer as a handful of native calls: norm, attention, residual, norm, feed-forward, residual.

It takes over the forward of a stock decoder layer of the pre-norm families. The stock layer, its children and their
names stay; its stock forward serves whenever somebody listens inside it (forward hooks, as for `output_attentions` and
`output_router_logits`) or has chosen another attention implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.kernels.ops import add_scaled_, rms_norm
from moesaic.modules.attention import ATTENTION_NAME
from moesaic.modules.families import Family
from moesaic.modules.gqa import GqaAttention
from moesaic.modules.mla import MlaAttention
from moesaic.modules.moe_block import DenseMlp, MoeBlock, feed_forward_of
from moesaic.modules.norm import RMSNorm

__all__ = ["DecoderLayerForward"]

_MLP_NAMES = ("mlp", "block_sparse_moe")
_CHILDREN = frozenset({"self_attn", *_MLP_NAMES, "input_layernorm", "post_attention_layernorm"})


class DecoderLayerForward:
    """The forward of one decoder layer.

    Args:
        layer: the stock layer; its forward as it is now becomes the one to fall back on.
        attention: native form of its attention.
        feed_forward: native form of its MLP or MoE block.
    """

    def __init__(
        self, layer: nn.Module, attention: GqaAttention | MlaAttention, feed_forward: MoeBlock | DenseMlp
    ) -> None:
        self.stock_forward = layer.forward
        self.attention, self.feed_forward = attention, feed_forward
        self.input_norm, self.middle_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.residual_scale = float(getattr(layer, "residual_multiplier", 1.0))
        self.config = attention.module.config
        self.inner = [module for module in layer.modules() if module is not layer]

    @classmethod
    def take_over(cls, layer: nn.Module, family: Family, config: Any, num_pairs: int, name: str) -> bool:
        """Replace the forward of a loaded layer, or of those of its blocks that are known.

        Args:
            layer: a stock decoder layer whose weights are packed.
            family: what its structure does not tell.
            config: the model's configuration.
            num_pairs: pairs of a head that the model's rotary embedding rotates.
            name: qualified name of the layer.

        Returns:
            Whether the layer as a whole is fused.
        """
        block_name = next((key for key in _MLP_NAMES if hasattr(layer, key)), None)
        if block_name is None or not hasattr(layer, "self_attn"):
            return False
        feed_forward = feed_forward_of(getattr(layer, block_name), family, config, f"{name}.{block_name}")
        attention = _attention_of(layer.self_attn, family, config, num_pairs)
        if not family.fuse_layers or any(key not in _CHILDREN for key, _ in layer.named_children()):
            return False
        if not isinstance(layer.input_layernorm, RMSNorm) or not isinstance(layer.post_attention_layernorm, RMSNorm):
            return False
        if attention is None or feed_forward is None:
            return False
        layer.forward = cls(layer, attention, feed_forward)
        return True

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = False,
        position_embeddings: Any | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the stock layer: float32 `[batch, num_tokens, hidden_size]` to the same."""
        if self._observed():
            stock: torch.Tensor = self.stock_forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return stock
        batch, num_tokens, width = hidden_states.shape
        x = hidden_states.reshape(batch * num_tokens, width)
        normed = rms_norm(x, self.input_norm.weight, self.input_norm.eps)
        weight, eps = self.middle_norm.weight, self.middle_norm.eps
        attended = self.attention(normed, batch, position_embeddings, attention_mask, past_key_values)
        # The layer's input belongs to somebody else, so the sum is made in memory of our own.
        if self.residual_scale == 1.0:
            residual, normed = attended, rms_norm(x, weight, eps, residual=attended)
        else:
            residual = x.clone()
            normed = rms_norm(attended, weight, eps, residual=residual, residual_scale=self.residual_scale)
        add_scaled_(residual, self.feed_forward(normed), self.residual_scale)
        return residual.view(batch, num_tokens, width)

    def _observed(self) -> bool:
        """Somebody hooks a module inside the layer, or wants another attention implementation."""
        if self.config._attn_implementation != ATTENTION_NAME:
            return True
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.inner)


def _attention_of(module: nn.Module, family: Family, config: Any, num_pairs: int) -> GqaAttention | MlaAttention | None:
    if hasattr(module, "kv_a_proj_with_mqa"):
        mla = MlaAttention.of(module, family.rope_layout(config))
        if mla is not None:
            mla.take_over()
        return mla
    return GqaAttention.of(module, family.rope_layout(config), num_pairs)
