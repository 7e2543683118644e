"""What a loaded decoder layer consists of, for who runs layers by their parts: a GPU, or a paged cache on the CPU.

Of a fused layer that is what its forward holds. Layers that run in the model library's forward are taken apart here
where there are kernels for the parts: gated attention and linear attention between norms and residuals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.errors import UnsupportedModelError
from moesaic.kernels.blocks import FeedForwardBlock
from moesaic.modules.decoder import DecoderLayerForward
from moesaic.modules.delta_net import DeltaNetParts
from moesaic.modules.families import FAMILIES, Family, StockModule
from moesaic.modules.feed_forward import feed_forward_block
from moesaic.modules.gqa import GqaParts
from moesaic.modules.mla import MlaAttention

__all__ = ["LayerParts", "layer_parts"]

_CHILDREN = frozenset({"self_attn", "linear_attn", "mlp", "input_layernorm", "post_attention_layernorm"})


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """`x += attention(norm(x)); x += feed_forward(norm(x))`, each part with its norm."""

    attention: GqaParts | MlaAttention | DeltaNetParts
    feed_forward: FeedForwardBlock


def layer_parts(layer: StockModule, config: Any, name: str) -> LayerParts:
    """Take a loaded layer apart; its weights stay where they are.

    Args:
        layer: a decoder layer with packed weights.
        config: the model's configuration.
        name: what to call the layer in errors.

    Raises:
        UnsupportedModelError: it has parts that are not known here.
    """
    forward = layer.forward
    if isinstance(forward, DecoderLayerForward):
        attention = forward.attention
        return LayerParts(attention if isinstance(attention, MlaAttention) else attention.parts, forward.feed_forward)
    family = FAMILIES.get(config.model_type)
    parts = None if family is None else _unfused(layer, family, config, name)
    if parts is None:
        raise UnsupportedModelError(
            f"{name} ({type(layer).__name__}): its parts are not all known to the kernels, so that it runs neither on "
            "a GPU nor on a paged cache: use the plan 'cpu', one request at a time."
        )
    return parts


def _unfused(layer: StockModule, family: Family, config: Any, name: str) -> LayerParts | None:
    children = dict(layer.named_children())
    if not children.keys() <= _CHILDREN or "mlp" not in children or hasattr(layer, "residual_multiplier"):
        return None
    attention: GqaParts | DeltaNetParts | None = None
    if "linear_attn" in children and "self_attn" not in children:
        attention = DeltaNetParts.of(layer.linear_attn, layer.input_layernorm)
    elif "self_attn" in children and "linear_attn" not in children:
        attention = GqaParts.of(layer.self_attn, layer.input_layernorm, family.rope_layout(config), 1.0)
    if attention is None:
        return None
    feed_forward = feed_forward_block(layer.mlp, layer.post_attention_layernorm, family, config, 1.0, f"{name}.mlp")
    return None if feed_forward is None else LayerParts(attention, feed_forward)
