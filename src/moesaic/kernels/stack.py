"""Decoder layers one after the other as one native call: what a decode step gains is the way back to Python in between.

The layers' blocks were described and checked before; see `blocks`. It knows no model and no cache but its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels.attention_blocks import AttentionBlock, LatentAttentionBlock, cache_arguments
from moesaic.kernels.blocks import FeedForwardBlock

__all__ = ["DecoderStack"]


class DecoderStack:
    """Attention and feed-forward block of each layer, in order.

    Args:
        layers: blocks of equal widths.
    """

    def __init__(self, layers: Sequence[tuple[AttentionBlock | LatentAttentionBlock, FeedForwardBlock]]) -> None:
        self.layers = list(layers)  # the native stack holds addresses into these
        self.native: Any = _native.DecoderStack(
            [(attention.block, forward.block) for attention, forward in self.layers]
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        num_past: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all layers; arguments as those of `AttentionBlock`, but keys and values of each layer.

        Returns:
            float32 `[batch, num_tokens, hidden]`, in memory of its own.

        Raises:
            KernelError: a tensor has another shape, type or layout than said there, or differs between layers.
        """
        if len(caches) != len(self.layers):
            raise KernelError(f"{len(caches)} caches for {len(self.layers)} layers.")
        first = caches[0]
        inputs, kind, mask_parts = self.layers[0][0].prepare(x, cos, sin, first, num_past, mask)
        capacity, dtype = first[0].shape[2], first[0].dtype
        for (attention, _), cache in zip(self.layers[1:], caches[1:], strict=True):
            attention.check_caches(cache, x.shape[0], capacity, dtype)
        outputs = torch.empty_like(x), torch.empty_like(x)
        self.native(
            *inputs,
            [cache_arguments(cache) for cache in caches],
            kind,
            num_past,
            *mask_parts,
            outputs[0].data_ptr(),
            outputs[1].data_ptr(),
        )
        return outputs[(len(caches) - 1) % 2]
