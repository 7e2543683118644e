"""Which experts lie on the GPU: all of a layer's, some of them in a cache, or none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.kernels.triton.grouped_experts import ExpertPairs
from moesaic.modules.gpu.experts import ResidentExperts
from moesaic.modules.gpu.step import Routed

__all__ = ["ExpertSlots"]


class ExpertSlots:
    """Experts in the memory of the GPU.

    Args:
        resident: layers (counted among those with routed experts) whose experts are all there, for ever.
        cache: of the experts of the other layers, or None.
    """

    def __init__(self, resident: Mapping[int, ResidentExperts] | None = None, cache: ExpertCache | None = None) -> None:
        self._resident, self.cache = dict(resident or {}), cache

    def is_complete(self, layer: int) -> bool:
        """Whether all experts of a layer are there, now and for ever."""
        return layer in self._resident

    def has_all(self, layer: int) -> bool:
        """Whether all experts of a layer are there now, in the cache or for ever."""
        held = None if self.is_complete(layer) else self.held(layer)
        return self.is_complete(layer) or (held is not None and bool(held.all()))

    def table(self, layer: int) -> torch.Tensor | None:
        """int32 `[num_experts]` on the GPU, the slot of each expert or -1; None if none can be there."""
        if layer in self._resident:
            return self._resident[layer].table
        return None if self.cache is None else self.cache.table(layer)

    def held(self, layer: int) -> np.ndarray | None:
        """Bool `[num_experts]`, experts of a layer that are in the cache, or nearly; None if there is no cache."""
        return None if self.cache is None else self.cache.held(layer)

    def compute(self, routed: Routed) -> torch.Tensor | None:
        """Weighted sum of the chosen experts that are there: float32 `[tokens, hidden_size]`; None if none can be."""
        if routed.slots is None:
            return None
        if routed.layer in self._resident:
            return self._resident[routed.layer].compute(routed.hidden, routed.slots, routed.chosen, routed.weights)
        return None if self.cache is None else self.cache.compute(routed)

    def multiply(self, layer: int, pairs: ExpertPairs) -> torch.Tensor | None:
        """Products with the experts of a layer that are in the cache; their table, or None if there is no cache."""
        if self.cache is None:
            return None
        self.cache.multiply(layer, pairs)
        return self.cache.table(layer)
