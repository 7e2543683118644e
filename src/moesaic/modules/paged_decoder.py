"""The decoder of a model on the CPU for many sequences at once, on a paged cache.

It is made of what the model's fused forwards hold already, so it takes no memory of its own but the rotary angles, and
the model goes on to work as before. It knows no sequences, only where the tokens of a step are.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.errors import UnsupportedModelError
from moesaic.kernels.paged_stack import PagedStack
from moesaic.kvcache.paged import KvShape, PoolLayer
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.ends import DecoderEnds
from moesaic.modules.gqa import GqaAttention
from moesaic.modules.mla import MlaAttention
from moesaic.modules.rotary import position_angles
from moesaic.modules.stack import LayerStack
from moesaic.modules.windows import sliding_window_of

__all__ = ["PagedDecoder", "paged_cache_shapes"]


class PagedDecoder:
    """Embedding, layers, last norm and head.

    Args:
        model: a loaded causal language model on the CPU.
        max_positions: positions that rotary angles are kept for.

    Attributes:
        ends: embedding, last norm and head.
        cache_shapes: of each layer, what it stores per position.
        num_layers: of the model.
        max_positions: most positions that a sequence may have.

    Raises:
        UnsupportedModelError: the model has parts that do not run on a paged cache.
    """

    def __init__(self, model: Any, max_positions: int) -> None:
        self._native = _stack_of(model).native
        self.ends = DecoderEnds.of(model)
        self.cache_shapes = paged_cache_shapes(model)
        self.num_layers, self.max_positions = len(self.cache_shapes), max_positions
        config = model.config.get_text_config()
        self._windows = [sliding_window_of(config, index) for index in range(self.num_layers)]
        self._cos, self._sin = position_angles(model.get_decoder().rotary_emb, max_positions)

    def with_caches(self, caches: list[PoolLayer]) -> PagedStack:
        """The layers on pools of these blocks."""
        return PagedStack(self._native, [(cache.keys, cache.values) for cache in caches], self._windows)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of int64 `[tokens]`: float32 `[tokens, num_pairs]` each."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    @staticmethod
    def run(
        stack: PagedStack,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        where: StepInput,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """Layers `first` to `first + count - 1` (all that are left if None) on `[tokens, hidden_size]`, in place."""
        stack(
            hidden,
            *angles,
            where.slot_mapping,
            where.block_tables,
            where.seq_lens,
            where.query_start,
            first,
            count,
        )


def paged_cache_shapes(model: Any) -> list[KvShape]:
    """What each layer of a loaded model stores per position.

    Raises:
        UnsupportedModelError: the model has parts that do not run on a paged cache.
    """
    return [_cache_shape(attention) for attention in _stack_of(model).attentions]


def _stack_of(model: Any) -> LayerStack:
    shared = getattr(model, "_shared_state", None)
    stack: LayerStack | None = None if shared is None else shared.stack
    if stack is None or not stack.is_whole:
        raise UnsupportedModelError(
            f"{type(model).__name__}: not all of its layers are fused on the CPU, so that it does not run on a paged "
            "cache: use one request at a time."
        )
    return stack


def _cache_shape(attention: GqaAttention | MlaAttention) -> KvShape:
    if isinstance(attention, MlaAttention):
        return KvShape.latent(attention.latent_dim, attention.rope_dim)
    block = attention.block
    return KvShape(block.kv_heads, block.head_dim, block.head_dim)
