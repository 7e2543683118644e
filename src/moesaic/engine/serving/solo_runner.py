"""Steps of any loaded model, one sequence after the other, each on a cache of its own.

It serves what has no paged cache on the CPU: layers of the model library, families that are not known. Blocks are
only counted, so that memory stays within its budget; prefixes are not shared. A step is the whole model: there are no
layers to stop between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moesaic.errors import GenerationError
from moesaic.kernels import ops
from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache
from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.states import StatePool

__all__ = ["SoloRunner"]


class SoloRunner:
    """A model of which each sequence has its own cache.

    Args:
        model: a loaded causal language model, or a stock one.
        num_blocks: that all sequences together may have.
        block_size: positions of a block.
        max_batch: most sequences of a step.
        max_chunk: most tokens of a prefill.

    Attributes: as `StepRunner`.
    """

    shares_prefixes = False
    shared_positions: int | None = None
    num_layers = 1

    def __init__(
        self, model: Any, num_blocks: int, block_size: int = 16, max_batch: int = 64, max_chunk: int = 2048
    ) -> None:
        self._model, self._caches = model, WeakKeyDictionary[PagedSequence, Any]()
        self.pool = BlockPool(num_blocks, block_size)
        self.max_batch, self.max_chunk = max_batch, max_chunk
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        cache = self._new_cache()
        keeps_all = not any(cache.is_sliding) and not any(cache.is_linear)
        self.on_launch: Callable[[], None] = lambda: None
        self.states = None if keeps_all else StatePool(max_batch)

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        return PagedSequence(self.pool, self.states)

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """As `StepRunner.decode`; there is no moment from which on Python has nothing to do."""
        self.on_launch()
        parts = [
            (sequence, torch.tensor([token], dtype=torch.int64))
            for sequence, token in zip(sequences, token_ids, strict=True)
        ]
        work = self.start_prefill(parts)
        try:
            work.advance(1)
        except BaseException:
            work.abandon()
            raise
        return work.logits()

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `StepRunner.decode_likeliest`."""
        return ops.likeliest(self.decode(sequences, token_ids))

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> SoloPrefill:
        """As `StepRunner.start_prefill`."""
        return SoloPrefill(self, parts)

    def forward(self, sequence: PagedSequence, ids: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `[vocab_size]`, behind tokens, int64 `[tokens]`, that are a sequence's last ones already."""
        cache = self._caches.get(sequence)
        if cache is None:
            cache = self._caches[sequence] = self._new_cache()
        with torch.no_grad():
            out = self._model(input_ids=ids.unsqueeze(0), use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        logits: torch.Tensor = out.logits[0, -1].float()
        return logits

    def take_back(self, sequence: PagedSequence, length: int) -> None:
        """Forget what was appended behind so many positions, computed or not; everything, if it cannot go back."""
        if self.states is not None:
            self.forget(sequence)
            return
        cache = self._caches.get(sequence)
        if cache is not None:
            for layer in cache.layers:  # a forward that failed may have left them with different lengths
                layer.crop(min(0, length - layer.get_seq_length()))
        sequence.undo(length)

    def _new_cache(self) -> Any:
        return self._model.new_cache() if hasattr(self._model, "new_cache") else GrowingCache(self._model.config)

    def prepare(self, num_sequences: int) -> bool:
        """As `StepRunner.prepare`: there is nothing to prepare."""
        return False

    def expert_uses(self) -> tuple[int, int]:
        """No cache of experts."""
        return 0, 0

    def forget(self, sequence: PagedSequence) -> None:
        """Give back a sequence's blocks and its cache."""
        self._caches.pop(sequence, None)
        sequence.free()

    def close(self) -> None:
        """Give all caches back."""
        self._caches.clear()


class SoloPrefill:
    """A `PrefillWork` of one layer, which is all of them.

    Args:
        runner: who computes.
        parts: sequences, each with its new tokens, int64 `[tokens]`.

    Raises:
        GenerationError: the cache is full; nothing was appended.
    """

    def __init__(self, runner: SoloRunner, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> None:
        self._runner, self._parts = runner, list(parts)
        self._before = [sequence.length for sequence, _ in parts]
        self._logits: list[torch.Tensor] = []
        try:
            for sequence, ids in parts:
                sequence.append(len(ids))
        except GenerationError:
            for (sequence, _), length in zip(parts, self._before, strict=True):
                sequence.undo(min(length, sequence.length))
            raise

    @property
    def num_layers_left(self) -> int:
        """As `PrefillWork`."""
        return int(len(self._logits) < len(self._parts))

    def advance(self, num_layers: int) -> None:
        """As `PrefillWork`."""
        if num_layers:
            self._logits = [self._runner.forward(sequence, ids) for sequence, ids in self._parts]

    def logits(self) -> torch.Tensor:
        """As `PrefillWork`."""
        return torch.stack(self._logits)

    def abandon(self) -> None:
        """As `PrefillWork`."""
        for (sequence, _), length in zip(self._parts, self._before, strict=True):
            self._runner.take_back(sequence, length)
