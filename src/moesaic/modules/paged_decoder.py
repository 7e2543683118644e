"""The decoder of a model on the CPU for many sequences at once, on a paged cache and recurrent states.

It is made of what the model's fused forwards hold already, or of the parts of its layers, so it takes no memory of its
own but the rotary angles, and the model goes on to work as before. It knows no sequences, only where the tokens of a
step are.
"""

from __future__ import annotations

from typing import Any

from moesaic.errors import UnsupportedModelError
from moesaic.kernels.block_parts import Linear, Norm
from moesaic.kernels.blocks import FeedForwardBlock
from moesaic.kernels.paged_model import DecodeStep, PagedModel
from moesaic.kernels.paged_stack import PagedStack
from moesaic.kvcache.paged import KvShape, PoolLayer
from moesaic.kvcache.states import StateLayer, StateShape
from moesaic.modules.delta_net import DeltaNetParts
from moesaic.modules.ends import DecoderEnds
from moesaic.modules.gqa import GqaAttention, GqaParts
from moesaic.modules.layer_parts import layer_parts
from moesaic.modules.mla import MlaAttention
from moesaic.modules.moving_rope import angles_for
from moesaic.modules.paged_layers import FusedLayers, LayersInParts, PagedDeltaNet, PagedGqa, PagedLayers
from moesaic.modules.stack import LayerStack
from moesaic.modules.windows import sliding_window_of

__all__ = ["PagedDecoder", "paged_cache_shapes"]

_Parts = list[tuple[PagedGqa | PagedDeltaNet, FeedForwardBlock]]


class PagedDecoder:
    """Embedding, layers, last norm and head.

    Args:
        model: a loaded causal language model on the CPU.
        max_positions: positions that rotary angles are kept for.

    Attributes:
        angles: by positions; see `moving_rope`.
        ends: embedding, last norm and head.
        cache_shapes: of each layer, what it stores per position, or per sequence.
        num_layers: of the model.
        max_positions: most positions that a sequence may have.

    Raises:
        UnsupportedModelError: the model has parts that do not run on a paged cache.
    """

    def __init__(self, model: Any, max_positions: int) -> None:
        self._layers = _layers_of(model)
        self.ends = DecoderEnds.of(model)
        self.cache_shapes = _cache_shapes(self._layers)
        self.num_layers, self.max_positions = len(self.cache_shapes), max_positions
        self._windows: list[int | None] = []
        if isinstance(self._layers, LayerStack):
            config = model.config.get_text_config()
            self._windows = [sliding_window_of(config, index) for index in range(self.num_layers)]
        self.angles = angles_for(model.get_decoder().rotary_emb, max_positions)

    def with_caches(self, caches: list[PoolLayer | StateLayer]) -> PagedLayers:
        """The layers on these pools and states, one of the layer's shape for each."""
        if not isinstance(self._layers, LayerStack):
            return LayersInParts(self._layers, caches)
        pools = [(cache.keys, cache.values) for cache in caches if isinstance(cache, PoolLayer)]
        return FusedLayers(PagedStack(self._layers.native, pools, self._windows))

    def decode_step(self, layers: PagedLayers, max_batch: int) -> DecodeStep | None:
        """What computes decode steps of up to `max_batch` sequences as one native call each.

        Args:
            layers: from `with_caches`.
            max_batch: most sequences of a step.

        Returns:
            None where layers are called part by part.
        """
        if not isinstance(layers, FusedLayers):
            return None
        ends = self.ends
        model = PagedModel(
            layers.stack,
            Linear(ends.embedding.packed),
            Norm(ends.norm.weight, ends.norm.eps),
            Linear(ends.head.packed, ends.head.bias),
            *self.angles.tables,
            embedding_scale=ends.embedding_scale,
            logit_scale=ends.logit_scale,
        )
        return DecodeStep(model, max_batch)


def paged_cache_shapes(model: Any) -> list[KvShape | StateShape]:
    """What each layer of a loaded model stores per position, or per sequence.

    Raises:
        UnsupportedModelError: the model has parts that do not run on a paged cache.
    """
    return _cache_shapes(_layers_of(model))


def _layers_of(model: Any) -> LayerStack | _Parts:
    """All layers as one native call, or else their parts.

    Raises:
        UnsupportedModelError: there are layers that are neither.
    """
    shared = getattr(model, "_shared_state", None)
    stack: LayerStack | None = None if shared is None else shared.stack
    if stack is not None and stack.is_whole:
        return stack
    if shared is None or shared.has_stock_parts:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its layers run in the model library's forwards, so that it does not run on a "
            "paged cache: use one request at a time."
        )
    return [_in_parts(model, index, layer) for index, layer in enumerate(model.get_decoder().layers)]


def _in_parts(model: Any, index: int, layer: Any) -> tuple[PagedGqa | PagedDeltaNet, FeedForwardBlock]:
    parts = layer_parts(layer, model.config, f"layer {index}")
    if isinstance(parts.attention, DeltaNetParts):
        return PagedDeltaNet(parts.attention), parts.feed_forward
    if isinstance(parts.attention, GqaParts):
        window = sliding_window_of(model.config.get_text_config(), index)
        return PagedGqa(parts.attention, window), parts.feed_forward
    raise UnsupportedModelError(
        f"layer {index} has latent attention beside layers that are not fused, which no paged cache serves yet: use "
        "one request at a time."
    )


def _cache_shapes(layers: LayerStack | _Parts) -> list[KvShape | StateShape]:
    if isinstance(layers, LayerStack):
        return [_cache_shape(attention) for attention in layers.attentions]
    return [attention.cache_shape for attention, _ in layers]


def _cache_shape(attention: GqaAttention | MlaAttention) -> KvShape:
    if isinstance(attention, MlaAttention):
        return KvShape.latent(attention.latent_dim, attention.rope_dim)
    block = attention.block
    return KvShape(block.kv_heads, block.head_dim, block.head_dim)
