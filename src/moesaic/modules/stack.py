"""A decode step through all decoder layers as one native call.

The model library still calls every layer. The first one computes all of them, and the others hand on what it gave,
which is only done while nobody could tell the difference: all layers are fused, nobody hooks them or anything inside,
and their caches grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from moesaic.kernels.stack import DecoderStack

if TYPE_CHECKING:
    from moesaic.modules.decoder import DecoderLayerForward
    from moesaic.modules.gqa import GqaAttention
    from moesaic.modules.mla import MlaAttention

__all__ = ["LayerStack"]


class LayerStack:
    """The layers of a model in which all are fused.

    Args:
        layers: their forwards, in order.

    Attributes:
        native: their blocks, of those whose attention is one native call.
        is_whole: whether these are all.
    """

    def __init__(self, layers: list[DecoderLayerForward]) -> None:
        self._layers = layers
        blocks = [(layer.attention.block, layer.feed_forward) for layer in layers]
        self.native = DecoderStack([(attention, forward) for attention, forward in blocks if attention is not None])
        self.is_whole = all(attention is not None for attention, _ in blocks)
        self._result: torch.Tensor | None = None

    @property
    def attentions(self) -> list[GqaAttention | MlaAttention]:
        """Of the layers, in order."""
        return [layer.attention for layer in self._layers]

    def take(self, layer: DecoderLayerForward, x: torch.Tensor) -> bool:
        """Whether x has been through all layers already; asked by each after the first."""
        if x is not self._result:
            return False
        if layer is self._layers[-1]:
            self._result = None
        return True

    def run(self, x: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any | None) -> torch.Tensor | None:
        """All layers on float32 `[batch, 1, hidden_size]`; None where they have to run one by one."""
        self._result = None
        if x.shape[1] != 1 or not self.is_whole or len(self._layers) < 2 or torch_module._has_any_global_hook():
            return None
        if any(layer.is_observed() or _is_hooked(layer.layer) for layer in self._layers):
            return None
        attentions = self.attentions
        of_layers = [attention.growing_layer(x, cache) for attention in attentions]
        growing = [layer for layer in of_layers if layer is not None]
        if len(growing) != len(of_layers):
            return None
        reserved = [attention.reserve(x, layer) for attention, layer in zip(attentions, growing, strict=True)]
        if len({(keys.shape[2], num_past) for keys, _, num_past in reserved}) != 1:
            return None
        caches = [(keys, values) for keys, values, _ in reserved]
        out = self.native(x.contiguous(), *attentions[0].angles(positions), caches, reserved[0][2], mask)
        for layer in growing:
            layer.advance(1)
        self._result = out
        return out


def _is_hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
