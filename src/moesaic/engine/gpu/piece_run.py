"""A piece of prompts on its way through the layers on a GPU, and those of the tail: some at a time.

The last layer is computed for those tokens only behind which something is asked for: what the others leave in its cache
comes before. It does not know what other pieces there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moesaic.engine.gpu.prefill import ChunkPath
from moesaic.engine.gpu.prompt_pieces import Piece
from moesaic.kvcache.states import SavedStates
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import GpuStep

__all__ = ["PieceRun", "num_layers_of"]


def num_layers_of(decoder: GpuDecoder) -> int:
    """Layers of a model, the tail's included."""
    return len(decoder.layers) + (0 if decoder.tail is None else decoder.tail.num_layers)


class PieceRun:
    """One piece under way.

    Args:
        decoder: the model.
        step: where the tokens are.
        path: who computes routed experts.
        piece: the tokens.
        hidden: float32 `[tokens, hidden_size]` on the GPU, their embeddings.
        saved: recurrent states of sequences that go on, as they were; None: nobody will ask for them.
        on_end: called when it is through all layers or was given up, once.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        step: GpuStep,
        path: ChunkPath,
        piece: Piece,
        hidden: torch.Tensor,
        saved: SavedStates | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._decoder, self._step, self._path, self._piece, self._hidden = decoder, step, path, piece, hidden
        self._saved, self._on_end = saved, on_end
        self._num_layers, self.num_done = num_layers_of(decoder), 0
        self._rows: torch.Tensor | None = None  # of which nothing is computed yet behind the layers
        if piece.rows is not None:
            self._rows = torch.tensor(piece.rows, dtype=torch.int64, device=hidden.device)

    def advance(self, num_layers: int) -> int:
        """Go through so many more layers, or those that are left; how many they were."""
        first, last = self.num_done, min(self.num_done + num_layers, self._num_layers)
        on_gpu = len(self._decoder.layers)
        rows = self._rows if first < last == on_gpu == self._num_layers else None
        apart = rows is not None and self._piece.asks_some  # otherwise it is a layer like all
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
        self.num_done = last
        if last == self._num_layers:
            self.end()
        return last - first

    def wanted(self) -> torch.Tensor:
        """float32 `[tokens behind which something is asked for, hidden_size]`, when it is through all layers."""
        hidden, rows = self._hidden, self._rows
        return hidden if rows is None else hidden[rows.to(hidden.device)].contiguous()

    def end(self) -> None:
        """Nothing more is to come."""
        on_end, self._on_end, self._saved = self._on_end, None, None
        if on_end is not None:
            on_end()

    def take_back(self) -> None:
        """Let recurrent states be what they were; keys and values behind what counts harm nobody. It has ended."""
        if self._decoder.device.type == "cuda":  # copies beside the current stream may be under way
            torch.cuda.synchronize()
        if self._saved is not None:
            self._saved.restore()
        self.end()

    def _run_tail(self, first: int, count: int) -> None:
        tail = self._decoder.tail
        assert tail is not None
        parts = zip(self._hidden.cpu().split(self._piece.counts), self._piece.spans, strict=True)
        self._hidden = torch.cat([tail(part, sequence, first, count, end) for part, (sequence, _, end) in parts])
