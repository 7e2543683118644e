"""Rotary angles as the native kernels take them, from what the model library's rotary modules return."""

from __future__ import annotations

import torch

__all__ = ["Angles", "rotary_angles"]

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, float32 `[batch or 1, num_tokens, num_pairs]`, any strides."""


def rotary_angles(position_embeddings: Angles | torch.Tensor, num_pairs: int) -> Angles:
    """Angles of the first `num_pairs` pairs.

    Args:
        position_embeddings: (cos, sin) `[batch, tokens, num_pairs or 2 * num_pairs]`, where the second half repeats the
            first; or complex `[batch, tokens, num_pairs]` (DeepSeek-V2).
        num_pairs: half of the rotated dimensions.
    """
    if isinstance(position_embeddings, torch.Tensor):
        return position_embeddings.real, position_embeddings.imag
    cos, sin = position_embeddings
    return cos[..., :num_pairs], sin[..., :num_pairs]
