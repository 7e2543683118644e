"""A decoder layer as a handful of native calls: norm, attention, residual, norm, feed-forward, residual.

It takes over the forward of a stock decoder layer of the pre-norm families. The stock layer, its children and their
names stay; its stock forward serves whenever somebody listens inside it (forward hooks, as for `output_attentions` and
`output_router_logits`) or has chosen another attention implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.kernels.blocks import FeedForwardBlock
from moesaic.kvcache import given_cache
from moesaic.modules.families import Family, StockModule
from moesaic.modules.feed_forward import feed_forward_block
from moesaic.modules.gqa import GqaAttention
from moesaic.modules.mla import MlaAttention
from moesaic.modules.rotary import RotaryAngles
from moesaic.modules.stack import LayerStack

__all__ = ["DecoderLayerForward", "SharedState", "take_over_mla"]

_MLP_NAMES = ("mlp", "block_sparse_moe")
_CHILDREN = frozenset({"self_attn", *_MLP_NAMES, "input_layernorm", "post_attention_layernorm"})


@dataclass(slots=True)
class SharedState:
    """What the fused layers of one model share.

    Attributes:
        angles: converts position embeddings.
        fused: whether fused forwards may be used; False while another attention implementation is chosen.
        stack: all layers together, if all are fused.
        has_stock_parts: whether the plan leaves a part of a layer to the model library that has a native form.
    """

    angles: RotaryAngles
    fused: bool = True
    stack: LayerStack | None = None
    has_stock_parts: bool = False


class DecoderLayerForward:
    """The forward of one decoder layer.

    Args:
        layer: the stock layer; its forward as it is now becomes the one to fall back on.
        attention: native form of its attention.
        feed_forward: native form of its MLP or MoE block.
        shared: what all layers of the model share.
    """

    def __init__(
        self,
        layer: StockModule,
        attention: GqaAttention | MlaAttention,
        feed_forward: FeedForwardBlock,
        shared: SharedState,
    ) -> None:
        self.stock_forward = layer.forward
        self.attention, self.feed_forward = attention, feed_forward
        self.shared = shared
        self.is_first = layer.self_attn.layer_idx == 0
        # What transformers records (attentions, router logits), and what people hook: blocks and their parts.
        block = getattr(layer, next(key for key in _MLP_NAMES if hasattr(layer, key)))
        self.layer, self.inner = layer, (attention.module, block, *block.children())

    @classmethod
    def take_over(cls, layer: StockModule, family: Family, config: Any, shared: SharedState, name: str) -> bool:
        """Replace the forward of a loaded layer, or of those of its blocks that are known.

        Args:
            layer: a stock decoder layer whose weights are packed.
            family: what its structure does not tell.
            config: the model's configuration.
            shared: the model's.
            name: qualified name of the layer.

        Returns:
            Whether the layer as a whole is fused.
        """
        block_name = next((key for key in _MLP_NAMES if hasattr(layer, key)), None)
        if block_name is None or not hasattr(layer, "self_attn"):
            return False
        scale = float(getattr(layer, "residual_multiplier", 1.0))
        block, norm = getattr(layer, block_name), layer.post_attention_layernorm
        feed_forward = feed_forward_block(block, norm, family, config, scale, f"{name}.{block_name}")
        if not family.fuse_layers or any(key not in _CHILDREN for key, _ in layer.named_children()):
            return False
        attention = take_over_mla(layer, family, config, shared) or GqaAttention.of(
            layer.self_attn, layer.input_layernorm, family.rope_layout(config), shared.angles, scale
        )
        if attention is None or feed_forward is None:
            return False
        layer.forward = cls(layer, attention, feed_forward, shared)
        return True

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: Any | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the stock layer: float32 `[batch, num_tokens, hidden_size]` to the same."""
        if self.shared.stack is not None and self.shared.stack.take(self, hidden_states):
            return hidden_states
        if self.is_observed():
            stock: torch.Tensor = self.stock_forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return stock
        cache = given_cache(kwargs)
        if self.is_first and self.shared.stack is not None:
            whole = self.shared.stack.run(hidden_states, position_embeddings, attention_mask, cache)
            if whole is not None:
                return whole
        attended = self.attention(hidden_states, position_embeddings, attention_mask, cache)
        return self.feed_forward(attended)

    def is_observed(self) -> bool:
        """Somebody hooks a module inside the layer, or wants another attention implementation."""
        if not self.shared.fused:
            return True
        for module in self.inner:  # noqa: SIM110 (a generator costs more than the loop, at every layer and token)
            if module._forward_hooks or module._forward_pre_hooks:
                return True
        return False


def take_over_mla(layer: StockModule, family: Family, config: Any, shared: SharedState) -> MlaAttention | None:
    """Replace the forward of a layer's attention if it is a latent one."""
    if not hasattr(layer.self_attn, "kv_a_proj_with_mqa"):
        return None
    mla = MlaAttention.of(layer.self_attn, layer.input_layernorm, family.rope_layout(config), shared.angles)
    if mla is not None:
        mla.take_over()
    return mla
