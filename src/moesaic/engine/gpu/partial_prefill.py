"""A chunk of prompts on its way through the layers on a GPU, and those of the tail: some at a time.

Between two of its calls, decode steps may run. It does not know who decides how far it goes. The last layer is computed
for those tokens only whose logits are asked for: what the others leave in its cache comes before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from moesaic.engine.gpu.out_of_vram import told_if_out_of_vram
from moesaic.engine.gpu.prefill import ChunkPath
from moesaic.errors import KernelError
from moesaic.kvcache.paged import PagedSequence
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import GpuStep

__all__ = ["PartialPrefill", "WantedLogits"]

WantedLogits = Literal["last", "all", "none"]
"""Of a chunk: of the last token of each sequence, of all tokens, or nobody's."""


class PartialPrefill:
    """See `moesaic.engine.serving.runner.PrefillWork`.

    Args:
        decoder: the model.
        step: where the tokens are.
        path: who computes routed experts.
        parts: sequences, which have the tokens already, each with its length before and the number of its tokens.
        hidden: float32 `[tokens, hidden_size]` on the GPU, the tokens' embeddings.
        wanted: whose logits are asked for.
        on_end: called when it is through all layers or was abandoned, once.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        step: GpuStep,
        path: ChunkPath,
        parts: list[tuple[PagedSequence, int, int]],
        hidden: torch.Tensor,
        wanted: WantedLogits = "last",
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._decoder, self._step, self._path, self._parts, self._hidden = decoder, step, path, parts, hidden
        self._on_end = on_end
        self._done = 0
        self._rows: torch.Tensor | None = None  # of which nothing is computed yet behind the layers
        if wanted != "all":
            last = step.input.last_tokens.to(hidden.device)
            self._rows = last if wanted == "last" else last[:0]
        self._num_layers = len(decoder.layers) + (0 if decoder.tail is None else decoder.tail.num_layers)

    @property
    def num_layers_left(self) -> int:
        """Layers still to go, the tail's included."""
        return self._num_layers - self._done

    def advance(self, num_layers: int) -> None:
        """Go through so many more layers, or those that are left.

        Raises:
            GenerationError: the VRAM does not suffice.
        """
        first, last = self._done, min(self._done + num_layers, self._num_layers)
        on_gpu = len(self._decoder.layers)
        rows = self._rows if first < last == on_gpu == self._num_layers else None
        apart = rows is not None and len(rows) < len(self._hidden)  # otherwise it is a layer like all
        with torch.no_grad(), told_if_out_of_vram(f"{len(self._hidden)} tokens of prompts at once"):
            if first:
                self._path.interrupted()
            if first < on_gpu:
                self._decoder.run(self._hidden, self._step, first, min(last, on_gpu) - apart - first)
            if rows is not None and apart:
                self._hidden, self._rows = self._decoder.finish(self._hidden, self._step, rows), None
            if last > on_gpu:
                self._run_tail(max(first, on_gpu) - on_gpu, last - max(first, on_gpu))
        if self._hidden.is_cuda and last < self._num_layers:  # whoever takes the time, takes that of the GPU
            torch.cuda.current_stream().synchronize()
        self._done = last
        if last == self._num_layers:
            self._end()

    def _run_tail(self, first: int, count: int) -> None:
        tail = self._decoder.tail
        assert tail is not None
        pieces = self._hidden.cpu().split([number for _, _, number in self._parts])
        sequences = [sequence for sequence, _, _ in self._parts]
        self._hidden = torch.cat(
            [tail(piece, sequence, first, count) for piece, sequence in zip(pieces, sequences, strict=True)]
        )

    def logits(self) -> torch.Tensor:
        """float32 `[tokens that are wanted, vocab_size]` where the head is; when no layer is left."""
        if self.num_layers_left:
            raise KernelError(f"{self.num_layers_left} layers are left: there are no logits yet.")
        with torch.no_grad(), told_if_out_of_vram("the logits of a prompt"):
            hidden, rows = self._hidden, self._rows
            if rows is not None:
                hidden = hidden[rows.to(hidden.device)].contiguous()
            decoder = self._decoder
            if not len(hidden):
                return hidden.new_empty(0, decoder.vocab_size)
            return decoder.logits(hidden) if decoder.tail is None else decoder.tail.logits(hidden)

    def abandon(self) -> None:
        """Take the new positions back; sequences with recurrent states are emptied."""
        for sequence, length, _ in self._parts:
            sequence.truncate(0 if sequence.is_recurrent else length)
        self._done = self._num_layers
        self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()
