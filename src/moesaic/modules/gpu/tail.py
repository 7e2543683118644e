"""The last layers of a model on the CPU, behind first ones on a GPU: the traditional split.

It runs the layers of the CPU path as they are, sequence by sequence, on a growing cache per sequence. It does not know
what computed the hidden states that come in.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from moesaic.errors import UnsupportedModelError
from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache
from moesaic.kvcache.paged import PagedSequence
from moesaic.modules.split import why_no_tail

__all__ = ["CpuTail"]


class CpuTail:
    """Layers from `first` on, the last norm and the head.

    Args:
        model: a loaded model.
        first: the first layer on the CPU.

    Raises:
        UnsupportedModelError: a layer keeps a window or a recurrent state, which cannot be cut back.
    """

    def __init__(self, model: Any, first: int) -> None:
        self._config = model.config
        decoder = model.get_decoder()
        self._rotary, self._layers, self._first = decoder.rotary_emb, list(decoder.layers[first:]), first
        self._norm, self._head = decoder.norm, model.get_output_embeddings()
        self._scale = 1.0 / float(getattr(model.config.get_text_config(), "logits_scaling", 1.0))
        self._caches: WeakKeyDictionary[PagedSequence, GrowingCache] = WeakKeyDictionary()
        problem = why_no_tail(model.config, first)
        if problem:
            raise UnsupportedModelError(f"{type(model).__name__}: {problem}.")

    @property
    def num_layers(self) -> int:
        """Layers on the CPU."""
        return len(self._layers)

    def __call__(
        self,
        hidden: torch.Tensor,
        sequence: PagedSequence,
        first: int = 0,
        count: int | None = None,
        end: int | None = None,
    ) -> torch.Tensor:
        """Go on with tokens of a sequence; what the layers had of it from there on is forgotten.

        Args:
            hidden: float32 `[tokens, hidden_size]` on the CPU, behind the layers before `first`.
            sequence: already has them.
            first: of the layers on the CPU, where to go on.
            count: so many layers; all that are left if None.
            end: position behind the last token; the tokens are the newest if None.

        Returns:
            Hidden states behind these layers, float32 `[tokens, hidden_size]`.
        """
        cache = self._caches.setdefault(sequence, GrowingCache(self._config))
        end = sequence.length if end is None else end
        before = end - len(hidden)
        chosen = slice(first, None if count is None else first + count)
        for layer in cache.layers[self._first :][chosen]:
            layer.crop(min(0, before - layer.get_seq_length()))
        x = hidden.unsqueeze(0)
        positions = torch.arange(before, end).unsqueeze(0)
        angles = self._rotary(x, positions)
        for layer in self._layers[chosen]:
            x = layer(
                x,
                attention_mask=None,
                position_ids=positions,
                use_cache=True,
                position_embeddings=angles,
                **{CACHE_ARGUMENT: cache},
            )
        return x[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last norm and head: float32 `[tokens, hidden_size]` to `[tokens, vocab_size]`."""
        logits: torch.Tensor = self._head(self._norm(hidden))
        return logits if self._scale == 1.0 else logits * self._scale

    def copy(self, sequence: PagedSequence, twin: PagedSequence) -> None:
        """Give a sequence the states of another one."""
        cache = self._caches.get(sequence)
        if cache is None:
            return
        copied = GrowingCache(self._config)
        for index in range(self._first, len(cache.layers)):
            keys, values = cache.layers[index].keys, cache.layers[index].values
            if keys is not None:
                copied.layers[index].update(keys, values)
        self._caches[twin] = copied
