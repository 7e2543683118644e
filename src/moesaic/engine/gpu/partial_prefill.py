"""A chunk of prompts on its way through the layers on a GPU: some at a time, and in pieces where VRAM is short.

Between two of its calls, decode steps may run. It does not know who decides how far it goes. A piece for which the VRAM
does not suffice begins again as smaller ones; those before it stay as they are, and what was learnt holds for later
chunks (`ChunkLimit`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moesaic.engine.gpu.chunk_limit import ChunkLimit
from moesaic.engine.gpu.out_of_vram import told_if_out_of_vram
from moesaic.engine.gpu.piece_run import PieceRun, num_layers_of
from moesaic.engine.gpu.prompt_pieces import Piece, PromptChunk, WantedLogits
from moesaic.errors import KernelError, VramError
from moesaic.modules.gpu.decoder import GpuDecoder

__all__ = ["PartialPrefill", "WantedLogits"]


class PartialPrefill:
    """See `moesaic.engine.serving.runner.PrefillWork`.

    Args:
        decoder: the model.
        chunk: the tokens, whose positions the sequences have already.
        limit: how many of them may go together.
        start: begins a piece; VramError if there is no memory for it.
    """

    def __init__(
        self, decoder: GpuDecoder, chunk: PromptChunk, limit: ChunkLimit, start: Callable[[Piece], PieceRun]
    ) -> None:
        self._decoder, self._chunk, self._limit, self._start = decoder, chunk, limit, start
        self._num_layers = num_layers_of(decoder)
        self._begin = 0  # tokens that are through
        self._sizes = limit.pieces(chunk.num_tokens)  # of pieces that are not
        self._run: PieceRun | None = None  # the first of these
        self._found: list[torch.Tensor] = []  # of those that are, what logits are made of

    @property
    def num_layers_left(self) -> int:
        """Layers still to go, the tail's included, of all pieces together."""
        return self._num_layers * len(self._sizes) - (0 if self._run is None else self._run.num_done)

    def begin(self) -> None:
        """Begin the next piece, unless it has begun or there is none.

        Raises:
            VramError: there is no memory for the smallest one.
        """
        while self._run is None and self._sizes:
            try:
                self._run = self._start(self._chunk.piece(self._begin, self._begin + self._sizes[0]))
            except VramError as error:
                self._cut(error)

    def advance(self, num_layers: int) -> None:
        """Go through so many more layers, or those that are left, which may be more than they were.

        Raises:
            VramError: the VRAM does not suffice for the smallest piece.
        """
        while num_layers > 0 and self._sizes:
            self.begin()
            run = self._run
            assert run is not None
            try:
                with torch.no_grad(), told_if_out_of_vram(f"{self._sizes[0]} tokens of prompts at once"):
                    num_layers -= run.advance(num_layers)
            except VramError as error:
                run.take_back()
                run = self._run = None  # with all memory that it has
                torch.cuda.empty_cache()  # smaller tensors would be cut from what held larger ones, and be in the way
                self._cut(error)
                continue
            if run.num_done == self._num_layers:
                self._end_piece(run)

    def logits(self) -> torch.Tensor:
        """float32 `[tokens that are wanted, vocab_size]` where the head is; when no layer is left."""
        if self.num_layers_left:
            raise KernelError(f"{self.num_layers_left} layers are left: there are no logits yet.")
        with torch.no_grad(), told_if_out_of_vram("the logits of a prompt"):
            hidden = self._found[0] if len(self._found) == 1 else torch.cat(self._found)
            decoder = self._decoder
            if not len(hidden):
                return hidden.new_empty(0, decoder.vocab_size)
            return decoder.logits(hidden) if decoder.tail is None else decoder.tail.logits(hidden)

    def abandon(self) -> None:
        """Take the new positions back; sequences with recurrent states are emptied."""
        self._chunk.abandon()
        self._sizes = []
        run, self._run = self._run, None
        if run is not None:
            run.end()

    def _end_piece(self, run: PieceRun) -> None:
        size, *self._sizes = self._sizes
        self._found.append(run.wanted())
        self._run, self._begin = None, self._begin + size
        self._limit.passed(size)

    def _cut(self, error: VramError) -> None:
        """Let smaller pieces follow, after the next one has found too little memory; that error if it is small."""
        size = self._sizes[0]
        if not self._limit.can_cut(size):
            raise error
        self._limit.failed(size, str(error))
        self._sizes = self._limit.pieces(sum(self._sizes))
