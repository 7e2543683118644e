"""Rotary angles as the native kernels take them, from what the model library's rotary modules return."""

from __future__ import annotations

import torch

__all__ = ["Angles", "RotaryAngles"]

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, float32 `[batch or 1, num_tokens, num_pairs]`, any strides."""


class RotaryAngles:
    """Converts a model's position embeddings; all layers of a step share one conversion.

    Args:
        num_pairs: half of the dimensions that the model's rotary embedding rotates.
    """

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self._converted: tuple[Angles | torch.Tensor, Angles] | None = None

    def __call__(self, position_embeddings: Angles | torch.Tensor) -> Angles:
        """Angles of the rotated pairs.

        Args:
            position_embeddings: (cos, sin) `[batch, tokens, num_pairs or 2 * num_pairs]`, where the second half repeats
                the first; or complex `[batch, tokens, num_pairs]` (DeepSeek-V2).
        """
        if self._converted is None or self._converted[0] is not position_embeddings:
            if isinstance(position_embeddings, torch.Tensor):
                angles = position_embeddings.real, position_embeddings.imag
            else:
                cos, sin = position_embeddings
                angles = cos[..., : self.num_pairs], sin[..., : self.num_pairs]
            self._converted = position_embeddings, angles
        return self._converted[1]
