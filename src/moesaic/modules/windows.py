"""How far back the tokens of a layer see. It knows configurations of the model library, and no kernel."""

from __future__ import annotations

from typing import Any

from moesaic.errors import UnsupportedModelError

__all__ = ["sliding_window_of"]


def sliding_window_of(config: Any, layer_idx: int) -> int | None:
    """Positions that a layer's tokens see, or None for all; as the model library builds its masks.

    Args:
        config: of the text model.
        layer_idx: the decoder layer.

    Raises:
        UnsupportedModelError: the layer attends in another way.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return None if window is None else int(window)
    kind = kinds[layer_idx]
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and window is not None:
        return int(window)
    raise UnsupportedModelError(
        f"layer {layer_idx} has '{kind}', which no paged cache serves yet: use the plan 'cpu' for this model, one "
        "request at a time."
    )
