"""The decoder of a model on a GPU: its first layers or all, then last norm and head. The embedding stays on the CPU.

One row of the embedding per token is all that a step needs of it, so its memory is better spent on experts. It is made
from a loaded model whose layers can be taken apart (`layer_parts`), which afterwards has no weights but routed experts
and the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesaic.kernels.block_parts import Linear, Norm
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS
from moesaic.kernels.triton.read_ahead import ReadAhead, cache_share
from moesaic.kernels.triton.rotary import RotaryTable
from moesaic.modules.ends import DecoderEnds
from moesaic.modules.gpu.attention import GpuAttention, gpu_attention
from moesaic.modules.gpu.feed_forward import GpuFeedForward
from moesaic.modules.gpu.step import GpuStep
from moesaic.modules.gpu.tail import CpuTail
from moesaic.modules.gpu.weights import GpuLinear, GpuNorm
from moesaic.modules.layer_parts import LayerParts, layer_parts
from moesaic.modules.linear import PackedLinear
from moesaic.modules.rotary import position_angles

__all__ = ["GpuDecoder", "GpuLayer"]


@dataclass(frozen=True, slots=True, eq=False)
class GpuLayer:
    """A pre-norm decoder layer: attention, then MLP or MoE block, both with their norms and residuals."""

    attention: GpuAttention
    feed_forward: GpuFeedForward

    def __call__(
        self,
        x: torch.Tensor,
        step: GpuStep,
        normed: Lanes | None = None,
        then: NormBefore | None = None,
        follows: GpuLayer | None = None,
    ) -> Lanes | None:
        """Update float32 `[tokens, hidden_size]`, contiguous, in place.

        Args:
            x: what is updated.
            step: that this is part of.
            normed: what the layer before returned.
            then: the norm of what follows, for few tokens.
            follows: the next layer, if it is the next to be called.

        Returns:
            What follows reads, if `then` is given.
        """
        attended = self.attention(x, step, normed)
        feed_forward = None if follows is None else follows.feed_forward
        return self.feed_forward(x, attended, self.attention.residual_scale, step, then, feed_forward)

    def of_some(self, x: torch.Tensor, step: GpuStep, rows: torch.Tensor) -> torch.Tensor:
        """As a call, for some tokens; of the others only what they leave in the cache.

        Args:
            x: float32 `[tokens, hidden_size]`, contiguous, of all tokens.
            step: that this is part of.
            rows: int64 `[n]` on the device, the tokens.

        Returns:
            float32 `[n, hidden_size]`, memory of its own.
        """
        attended = self.attention(x, step)
        some = x[rows]
        if len(rows):
            self.feed_forward(some, attended[rows], self.attention.residual_scale, step.behind_attention(rows))
        return some


class GpuDecoder:
    """Layers, the last norm and the head.

    Args:
        model: a loaded causal language model; what goes to the GPU is taken out of it, layer by layer.
        device: the GPU.
        max_positions: positions that rotary angles are kept for.
        dtype: of matrices that are expanded (`weights.dense_heads`).
        num_layers: so many of the first layers; all, and what follows them, if None.

    Attributes:
        layers: on the GPU, in order.
        tail: what follows on the CPU, if not all layers are on the GPU.
        routed: routed experts of the layers that have any, in order, in the CPU's memory; None if they are not.
        hidden_size: width of a hidden state.
        top_k: experts per token, 0 without routed experts.

    Raises:
        UnsupportedModelError: the model has parts that do not run on a GPU yet.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        max_positions: int,
        dtype: torch.dtype = torch.bfloat16,
        num_layers: int | None = None,
    ) -> None:
        self.device, self.config = device, model.config.get_text_config()
        decoder = model.get_decoder()
        self.ends = DecoderEnds.of(model)
        self.angles = rotary_table(decoder, max_positions, device)
        shared = getattr(model, "_shared_state", None)
        if shared is not None:
            shared.stack = None  # all layers as one call, which holds on to all of them
        self.layers: list[GpuLayer] = []
        self.routed: list[PackedExperts | None] = []
        self.top_k = 0
        for index, layer in enumerate(decoder.layers[:num_layers]):
            self.layers.append(self._take(layer_parts(layer, model.config, f"layer {index}"), dtype))
            _drop_weights(layer)
        self.embedding = self.ends.embedding
        self.hidden_size, self.vocab_size = self.embedding.embedding_dim, self.ends.vocab_size
        self.tail: CpuTail | None = None
        if num_layers is not None and num_layers < len(decoder.layers):
            self.tail = CpuTail(model, num_layers)
            self._after = [*self._norms(), None]
            return
        self.norm = GpuNorm.of(Norm(decoder.norm.weight, decoder.norm.eps), device)
        head = model.get_output_embeddings()
        self.head = GpuLinear.of(Linear(head.packed, head.bias), device)
        if head.packed is not self.embedding.packed:
            head.packed = None
        self._after = [*self._norms(), self._norm_of_head()]

    def _norm_of_head(self) -> NormBefore | None:
        norm = self.norm.before(self.head.form)
        ahead = ReadAhead([self.norm.weight, self.head.weight.data], cache_share(self.device))
        return None if norm is None else norm._replace(ahead=ahead)

    def _norms(self) -> list[NormBefore | None]:
        """In front of each layer but the first, with weights that are worth reading while the layer before waits."""
        norms = []
        for layer in self.layers[1:]:
            norm = layer.attention.norm_before
            ahead = ReadAhead([*layer.attention.weights, *layer.feed_forward.weights], cache_share(self.device))
            norms.append(None if norm is None else norm._replace(ahead=ahead))
        return norms

    def _take(self, parts: LayerParts, dtype: torch.dtype) -> GpuLayer:
        attention = gpu_attention(parts.attention, self.config, self.device, dtype)
        source = parts.feed_forward
        has_experts = source.router is not None
        feed_forward = GpuFeedForward(source, self.device, len(self.routed) if has_experts else None)
        if feed_forward.routed is not None and source.route is not None:
            self.routed.append(feed_forward.routed)
            self.top_k = max(self.top_k, source.route.top_k)
        return GpuLayer(attention, feed_forward)

    def drop_routed(self, layer: int) -> None:
        """Give back the CPU's memory of a layer's routed experts, which lie on the GPU by now.

        Args:
            layer: position in `routed`, where None takes their place.
        """
        experts = self.routed[layer]
        self.routed[layer] = None
        for each in self.layers:
            if each.feed_forward.routed is experts:
                each.feed_forward.routed = None

    def embed(self, token_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of int64 `[tokens]` on the CPU: float32 `[tokens, hidden_size]`, in `out` if it is given."""
        return self.ends.embed(token_ids, out)

    def run(self, hidden: torch.Tensor, step: GpuStep, first: int = 0, count: int | None = None) -> Lanes | None:
        """All layers, or `count` from `first` on, on float32 `[tokens, hidden_size]`, contiguous, in place.

        Returns:
            What the head reads, after the last layer for few tokens.
        """
        normed = None
        last = len(self.layers) if count is None else first + count
        for index in range(first, last):
            follows = index + 1 < last or last == len(self.layers)
            then = self._after[index] if follows and 0 < len(hidden) <= MAX_DECODE_TOKENS else None
            following = self.layers[index + 1] if index + 1 < last else None
            normed = self.layers[index](hidden, step, normed, then, following)
        return normed

    def finish(self, hidden: torch.Tensor, step: GpuStep, rows: torch.Tensor) -> torch.Tensor:
        """The last layer, if nothing is asked for but some tokens: see `GpuLayer.of_some`. Without a tail."""
        return self.layers[-1].of_some(hidden, step, rows)

    def logits(
        self, hidden: torch.Tensor, normed: Lanes | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last norm and head, without a tail.

        Args:
            hidden: float32 `[tokens, hidden_size]`.
            normed: what `run` returned for them.
            out: float32 `[tokens, vocab_size]`, or None to allocate it.

        Returns:
            out.
        """
        logits = self.head(self.norm(hidden, self.head.form) if normed is None else normed, out)
        return logits if self.ends.logit_scale == 1.0 else logits.mul_(self.ends.logit_scale)


def rotary_table(decoder: Any, max_positions: int, device: torch.device) -> RotaryTable:
    """Cosines and sines of positions 0 to `max_positions` - 1, as the model's rotary embedding makes them.

    Raises:
        UnsupportedModelError: they depend on the length of the sequence.
    """
    cos, sin = position_angles(decoder.rotary_emb, max_positions)
    return RotaryTable(cos.to(device), sin.to(device))


def _drop_weights(layer: nn.Module) -> None:
    """Give back the CPU's memory of everything in a layer but its routed experts."""
    for module in layer.modules():
        vars(module).pop("forward", None)  # native forms of the CPU path, which hold on to weights
        if isinstance(module, PackedLinear):
            module.packed = None  # type: ignore[assignment]
            module.bias = None
