"""Rotary angles as the native kernels take them, from what the model library's rotary modules return."""

from __future__ import annotations

from typing import Any

import torch

from moesaic.errors import UnsupportedModelError

__all__ = ["MOVING_ROPES", "Angles", "RotaryAngles", "longest_context", "position_angles", "rope_type_of"]

MOVING_ROPES = frozenset({"dynamic", "longrope"})
"""What rescales frequencies when a sequence gets longer, so that no table of angles serves all lengths."""

_PIECE = 8192
"""Positions whose angles are made at a time."""

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


def position_angles(rotary_embedding: Any, max_positions: int) -> Angles:
    """Cosines and sines of positions 0 to `max_positions` - 1, as a model's rotary embedding makes them.

    Returns:
        float32 `[max_positions, num_pairs]` each, contiguous.

    Raises:
        UnsupportedModelError: they depend on the length of the sequence.
    """
    kind = rope_type_of(rotary_embedding)
    if kind in MOVING_ROPES:
        raise UnsupportedModelError(
            f"rotary embeddings of type '{kind}' change with the length of a sequence, which does not run on a GPU "
            "yet: use the plan 'cpu' for this model."
        )
    num_pairs = int(rotary_embedding.inv_freq.shape[0])
    cos, sin = torch.empty(max_positions, num_pairs), torch.empty(max_positions, num_pairs)
    angles = RotaryAngles(num_pairs)
    for first in range(0, max_positions, _PIECE):  # what the module makes in between is several times as large
        rows = torch.arange(first, min(first + _PIECE, max_positions))
        parts = angles(rotary_embedding(torch.zeros(1, 1), rows.unsqueeze(0)))
        cos[rows[0] : rows[-1] + 1], sin[rows[0] : rows[-1] + 1] = parts[0][0], parts[1][0]
    return cos, sin


def rope_type_of(rotary_embedding: Any) -> str:
    """How a model's rotary embedding scales frequencies, as the model library names it."""
    return str(getattr(rotary_embedding, "rope_type", "default"))


def longest_context(config: Any) -> int | None:
    """Most positions that a model is made for, if its configuration says so.

    Dynamic scaling begins where `max_position_embeddings` ends, and stretches it by its factor.

    Args:
        config: of the text model.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "dynamic":
        return length
    return int(length * max(1.0, float(rope.get("factor") or 1.0)))
