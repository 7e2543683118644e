"""Whether the last layers of a model can run on the CPU behind first ones on a GPU. It knows only the configuration."""

from __future__ import annotations

from typing import Any

from moesaic.kvcache import GrowingCache, GrowingLayer

__all__ = ["why_no_tail"]


def why_no_tail(config: Any, first: int) -> str:
    """Why layers from `first` on cannot be a tail, as the end of a sentence; "" if they can.

    Args:
        config: of the model.
        first: the first of them.
    """
    kept = GrowingCache(config).layers[first:]
    if all(isinstance(layer, GrowingLayer) for layer in kept):
        return ""
    return (
        "some of its last layers attend to a window or keep a recurrent state, which cannot run behind layers on a GPU "
        "yet: use the plan 'hybrid' or 'cpu'"
    )
