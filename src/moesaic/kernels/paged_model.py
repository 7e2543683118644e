"""Decode steps of a whole model on a paged cache as one native call: one new token of each of some sequences.

Python's share of a step is a few numbers in buffers that stay. It knows no model, and no cache but its tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, vector_address
from moesaic.kernels.block_parts import Linear, Norm
from moesaic.kernels.paged_stack import PagedStack

__all__ = ["DecodeStep", "PagedModel"]


class PagedModel:
    """Embedding, layers, last norm and head.

    Args:
        stack: the layers with their caches.
        embedding: of tokens, `[vocabulary, hidden]`.
        norm: behind the last layer.
        head: makes logits.
        cos: float32 `[positions, num_pairs]`, rotary angles of each position.
        sin: like cos.
        embedding_scale: factor of embeddings.
        logit_scale: factor of logits.

    Raises:
        KernelError: sizes do not go together.
    """

    def __init__(
        self,
        stack: PagedStack,
        embedding: Linear,
        norm: Norm,
        head: Linear,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
    ) -> None:
        positions, hidden = len(cos), stack.hidden
        for name, part in (("cos", cos), ("sin", sin)):
            check_shape(name, part, (positions, stack.num_pairs))
        self.vocab_size = head.weight.rows
        self._owners = stack, embedding, norm, head, cos, sin  # the native model holds addresses into these
        self.native: Any = _native.PagedModel(
            stack.native,
            embedding.arguments("the embedding", hidden),
            embedding_scale,
            norm.arguments("the last norm", hidden),
            head.arguments("the head", hidden),
            logit_scale,
            vector_address("cos", cos, cos.numel()),
            vector_address("sin", sin, sin.numel()),
            positions,
            stack.num_pairs,
        )


class DecodeStep:
    """Buffers of the decode steps of a model, and the way to compute one.

    Args:
        model: computes.
        max_batch: most sequences of a step.

    Attributes:
        ids: int64 `[max_batch]`, the new token of each sequence. The caller fills these before a step.
        positions: int64 `[max_batch]`, where it is in its sequence.
        slots: int64 `[max_batch]`, where its keys and values go, `block * block_size + offset`.
        lengths: int32 `[max_batch]`, positions of the sequence, the new one included.
    """

    def __init__(self, model: PagedModel, max_batch: int) -> None:
        self._model, self._max_batch = model, max_batch
        self.ids, self.positions, self.slots = (np.zeros(max_batch, np.int64) for _ in range(3))
        self.lengths = np.zeros(max_batch, np.int32)
        self._tables: NDArray[np.int32] = np.zeros((max_batch, 0), np.int32)
        self._logits = torch.empty(0, model.vocab_size)
        self._addresses = tuple(part.ctypes.data for part in (self.ids, self.positions, self.slots))
        self._lengths_address = self.lengths.ctypes.data
        self._places = 0, 0  # addresses of tables and logits, which may grow

    def tables(self, width: int) -> NDArray[np.int32]:
        """Block tables, int32 `[max_batch, at least width]`; what lies behind a sequence's blocks is never read.

        A wider array than before has other contents.
        """
        if width > self._tables.shape[1]:
            self._tables = np.zeros((self._max_batch, max(16, 2 * width)), np.int32)
            self._places = self._tables.ctypes.data, self._places[1]
        return self._tables

    def run(self, count: int, *, independent: bool) -> torch.Tensor:
        """Compute the step of the first `count` sequences.

        Args:
            count: of sequences.
            independent: as in `independent_rows`.

        Returns:
            float32 `[count, vocab_size]`; the next call overwrites it.

        Raises:
            KernelError: tables lead out of the pool, or a token is none of the vocabulary.
        """
        if not 1 <= count <= self._max_batch:
            raise KernelError(f"a step of {count} sequences: expected 1 to {self._max_batch}.")
        if count > len(self._logits):
            self._logits = torch.empty(count, self._model.vocab_size)
            self._places = self._places[0], self._logits.data_ptr()
        tables, logits = self._places
        width = self._tables.shape[1]
        try:
            self._model.native.decode(
                *self._addresses, tables, width, self._lengths_address, count, logits, independent
            )
        except (ValueError, IndexError) as error:
            raise KernelError(f"The numbers of a step do not go together: {error}.") from error
        return self._logits if count == len(self._logits) else self._logits[:count]
