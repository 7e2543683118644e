"""Decoder layers on the CPU for tokens of many sequences at once, on paged caches and recurrent states.

Where all layers are fused they are one native call. Others are called part by part: norm, projections of all tokens in
one product, attention or linear attention by sequences, output, feed-forward block. Neither knows sequences, only where
the tokens of a step are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moesaic.errors import KernelError
from moesaic.kernels import linear, linear_multi, ops
from moesaic.kernels.blocks import FeedForwardBlock
from moesaic.kernels.delta_net import DeltaNet
from moesaic.kernels.paged_attention import paged_attention
from moesaic.kernels.paged_stack import PagedStack
from moesaic.kvcache.paged import KvShape, PoolLayer
from moesaic.kvcache.states import StateLayer, StateShape
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.delta_net import DeltaNetParts
from moesaic.modules.gqa import GqaParts
from moesaic.modules.rotary import Angles

__all__ = ["FusedLayers", "LayersInParts", "PagedDeltaNet", "PagedGqa", "PagedLayers"]


class PagedLayers(Protocol):
    """All layers of a model with their caches."""

    def __call__(
        self, hidden: torch.Tensor, angles: Angles, where: StepInput, first: int = 0, count: int | None = None
    ) -> None:
        """Layers `first` to `first + count - 1` (all that are left if None), in place.

        Args:
            hidden: float32 `[tokens, hidden_size]`, contiguous.
            angles: cosines and sines, float32 `[tokens, num_pairs]` each, contiguous.
            where: the tokens are.
            first: layer to begin with.
            count: so many layers.
        """
        ...

    def finish(self, hidden: torch.Tensor, angles: Angles, where: StepInput) -> torch.Tensor:
        """The last layer for the last token of each sequence; of the others, only what they leave in its cache.

        Nothing else of them is ever asked for: logits are those of last tokens.

        Args: as those of a call; hidden may be overwritten. Each sequence has a token.

        Returns:
            float32 `[seqs, hidden_size]`.
        """
        ...


class FusedLayers:
    """All layers in one native call.

    Args:
        stack: computes them.

    Attributes:
        stack: as given.
    """

    def __init__(self, stack: PagedStack) -> None:
        self.stack = stack

    def __call__(
        self, hidden: torch.Tensor, angles: Angles, where: StepInput, first: int = 0, count: int | None = None
    ) -> None:
        """As `PagedLayers`."""
        self.stack(hidden, *angles, *self._tables(where), first, count)

    def finish(self, hidden: torch.Tensor, angles: Angles, where: StepInput) -> torch.Tensor:
        """As `PagedLayers`."""
        return self.stack.finish(hidden, *angles, *self._tables(where))

    @staticmethod
    def _tables(where: StepInput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return where.slot_mapping, where.block_tables, where.seq_lens, where.query_start


class PagedGqa:
    """`x += scale * attention(norm(x))`, grouped-query attention, perhaps with a gate on what heads attended to.

    Args:
        parts: of the layer.
        window: how many of the last positions a token sees; None: all.

    Attributes:
        cache_shape: what the layer stores per position.
    """

    def __init__(self, parts: GqaParts, window: int | None) -> None:
        self._parts, self._window = parts, window
        _, keys, values = (projection.weight.rows for projection in parts.projections)
        kv_heads = keys // parts.head_dim
        self.cache_shape = KvShape(kv_heads, parts.head_dim, values // kv_heads)

    def __call__(self, x: torch.Tensor, angles: Angles, where: StepInput, cache: PoolLayer | StateLayer) -> None:
        """Update float32 `[tokens, hidden_size]` in place; keys and values go into the cache."""
        if not isinstance(cache, PoolLayer) or cache.values is None:
            raise KernelError("a layer of grouped-query attention got no cache for keys and values.")
        parts = self._parts
        normed = ops.rms_norm(x, parts.norm.weight, parts.norm.eps)
        weights, biases = [p.weight for p in parts.projections], [p.bias for p in parts.projections]
        q, k, v = linear_multi(normed, weights, biases)
        heads = q.view(len(x), -1, parts.head_dim)
        keys, values = (part.view(len(x), self.cache_shape.kv_heads, -1) for part in (k, v))
        query = heads[:, ::2] if parts.output_gate else heads  # every head has a query and then its gate
        self._norm_and_rotate(query, keys, angles)
        for states, new in ((cache.keys, keys), (cache.values, values)):
            states.flatten(0, 1).index_copy_(0, where.slot_mapping, new.to(states.dtype))
        attended = paged_attention(
            query,
            cache.keys,
            cache.values,
            where.block_tables,
            where.seq_lens,
            where.query_start,
            scale=parts.scaling,
            sliding_window=self._window,
            sinks=parts.sinks,
        )
        if parts.output_gate:
            gates = q.view(-1, 2 * parts.head_dim)[:, parts.head_dim :]
            ops.sigmoid_mul_(attended.view(-1, parts.head_dim), gates)
        out = linear(attended.view(len(x), -1), parts.output.weight, parts.output.bias)
        ops.add_scaled_(x, out, parts.residual_scale)

    def _norm_and_rotate(self, query: torch.Tensor, keys: torch.Tensor, angles: Angles) -> None:
        """In place, `[tokens, heads, head_dim]` each."""
        parts = self._parts
        ops.norm_and_rotate_(
            query.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            angles[0].unsqueeze(0),
            angles[1].unsqueeze(0),
            layout=parts.rope_layout,
            norm=parts.head_norm,
            q_norm=None if parts.q_norm is None else parts.q_norm.weight,
            k_norm=None if parts.k_norm is None else parts.k_norm.weight,
            eps=0.0 if parts.q_norm is None else parts.q_norm.eps,
        )


class PagedDeltaNet:
    """`x += delta_net(norm(x))`, linear attention on a recurrent state per sequence.

    Args:
        parts: of the layer.

    Attributes:
        cache_shape: what the layer stores per sequence.
    """

    def __init__(self, parts: DeltaNetParts) -> None:
        self._parts = parts
        self._widths = [projection.weight.rows for projection in parts.projections]
        self._rule = DeltaNet(
            width=sum(self._widths),
            conv_columns=parts.conv_columns.contiguous(),
            gate_columns=parts.gate_columns.contiguous(),
            beta_columns=parts.beta_columns.contiguous(),
            decay_columns=parts.decay_columns.contiguous(),
            conv_weight=parts.conv_weight,
            rate=parts.rate,
            step_bias=parts.step_bias,
            norm=parts.out_norm,
            key_dim=parts.key_dim,
            value_dim=parts.value_dim,
        )
        channels, taps = parts.conv_weight.shape
        self.cache_shape = StateShape(taps - 1, channels, len(parts.rate), parts.key_dim, parts.value_dim)

    def __call__(self, x: torch.Tensor, angles: Angles, where: StepInput, cache: PoolLayer | StateLayer) -> None:
        """Update float32 `[tokens, hidden_size]` and the states in place; linear attention has no positions."""
        if not isinstance(cache, StateLayer):
            raise KernelError("a layer of linear attention got no recurrent states.")
        parts = self._parts
        normed = ops.rms_norm(x, parts.norm.weight, parts.norm.eps)
        projected = x.new_empty(len(x), sum(self._widths))
        for part, columns in zip(parts.projections, projected.split(self._widths, dim=1), strict=True):
            linear(normed, part.weight, part.bias, out=columns)
        attended = self._rule(
            projected, cache.conv, cache.recurrent, where.positions, where.query_start, where.state_slots
        )
        ops.add_scaled_(x, linear(attended, parts.output.weight, parts.output.bias))


class LayersInParts:
    """Layers that are not all fused, called part by part.

    Args:
        layers: attention and feed-forward block of each.
        caches: of each, of the attention's shape.
    """

    def __init__(
        self,
        layers: Sequence[tuple[PagedGqa | PagedDeltaNet, FeedForwardBlock]],
        caches: Sequence[PoolLayer | StateLayer],
    ) -> None:
        if len(layers) != len(caches):
            raise KernelError(f"{len(caches)} caches for {len(layers)} layers.")
        self._layers = [(*layer, cache) for layer, cache in zip(layers, caches, strict=True)]

    def __call__(
        self, hidden: torch.Tensor, angles: Angles, where: StepInput, first: int = 0, count: int | None = None
    ) -> None:
        """As `PagedLayers`."""
        for attention, feed_forward, cache in self._layers[first : None if count is None else first + count]:
            attention(hidden, angles, where, cache)
            feed_forward(hidden)

    def finish(self, hidden: torch.Tensor, angles: Angles, where: StepInput) -> torch.Tensor:
        """As `PagedLayers`; attention is computed for all tokens."""
        attention, feed_forward, cache = self._layers[-1]
        attention(hidden, angles, where, cache)
        last = hidden.index_select(0, where.last_tokens)
        feed_forward(last)
        return last
