"""A decoder on a GPU with its cache: chunks of prompts eagerly, decode steps by way of graphs.

It knows sequences and tokens; it chooses neither tokens nor whose turn it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from moesaic.engine.gpu.chunk_limit import ChunkLimit
from moesaic.engine.gpu.decode_steps import DecodeSteps
from moesaic.engine.gpu.hand_off import HandOff
from moesaic.engine.gpu.layer_caches import layer_caches
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.out_of_vram import told_if_no_lots, told_if_out_of_vram
from moesaic.engine.gpu.partial_prefill import PartialPrefill, WantedLogits
from moesaic.engine.gpu.piece_run import PieceRun
from moesaic.engine.gpu.prefill import ChunkBuffers, ChunkPath
from moesaic.engine.gpu.prompt_pieces import Piece, PromptChunk
from moesaic.engine.gpu.runner_options import RunnerOptions
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.streaming import StreamingPath
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.errors import GenerationError, KernelError
from moesaic.kernels import ops
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS
from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.states import SavedStates, StateLayer, StatePool, StateShape
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import GpuStep
from moesaic.modules.gpu.tail import CpuTail

__all__ = ["ModelRunner", "RunnerOptions"]


class ModelRunner:
    """A decoder with its cache.

    Args:
        decoder: the model.
        options: memory and time.
        slots: routed experts on the GPU; none if None.
        staging: buffers for experts that are streamed to the GPU in prefill; None: the CPU computes all of them.
        shares: who computes which experts in prefill, with `staging`.
        uploads: brings misses of decode steps to the GPU; if all are the CPU's, why.
        lending: memory of the cache and the buffers, which moves between them; None: each has its own.

    Attributes:
        pool: hands out blocks of the cache.
        states: hands out recurrent states; None if the model has none.
        caches: of every layer on the GPU.
        hand_off: by which decode steps ask the CPU for experts.
        server: the CPU's side of it; None if it has no experts.
        steps: decode steps.
        staging: as given.
        shares: as given.
        chunk_limit: how many tokens of prompts go through the layers at once, where the VRAM was short.
        no_uploads: why there are none.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        options: RunnerOptions,
        slots: ExpertSlots | None = None,
        staging: StagingBuffers | None = None,
        shares: ExpertShares | None = None,
        uploads: MissUploads | str = "nobody asked for it",
        lending: VramLending | None = None,
    ) -> None:
        self.decoder, self.options, self.staging, self.shares = decoder, options, staging, shares
        self.no_uploads = uploads if isinstance(uploads, str) else ""
        self._chunk_buffers, slots = ChunkBuffers(decoder.device), slots or ExpertSlots()
        self.chunk_limit = ChunkLimit(options.max_chunk, options.least_chunk)
        device = decoder.device
        shapes = [layer.attention.cache_shape for layer in decoder.layers]
        num_states = options.num_states or options.max_batch
        is_recurrent = any(isinstance(shape, StateShape) for shape in shapes)
        self.states = StatePool(num_states) if is_recurrent else None
        self.pool, self.caches = layer_caches(
            shapes, options.num_blocks, options.block_size, options.kv_dtype, num_states, device, lending
        )
        self.hand_off = HandOff(decoder, slots, options.max_batch, options.timeout, options.reads_ahead)
        self.server = self.hand_off.server
        max_blocks = self.pool.blocks_for(self.max_positions)
        used = None if isinstance(uploads, str) else uploads
        self.steps = DecodeSteps(decoder, self.caches, options, max_blocks, self.hand_off, slots, used, lending)

    @property
    def slots(self) -> ExpertSlots:
        """Routed experts on the GPU."""
        return self.steps.slots

    @property
    def uploads(self) -> MissUploads | None:
        """Who brings misses of decode steps to the GPU."""
        return self.steps.uploads

    @property
    def lending(self) -> VramLending | None:
        """Memory that moves, as given."""
        return self.steps.lending

    @property
    def max_positions(self) -> int:
        """Positions that a sequence may have."""
        of_all = self.pool.num_blocks * self.options.block_size
        return of_all if self.options.max_positions is None else min(self.options.max_positions, of_all)

    def prefill(
        self, parts: Sequence[tuple[PagedSequence, torch.Tensor]], wanted: WantedLogits = "last"
    ) -> torch.Tensor:
        """Append tokens to sequences.

        Args:
            parts: sequences, each with its new token ids, int64 `[tokens]` on the CPU.
            wanted: whose logits; what leads only to others is not computed.

        Returns:
            float32 `[sequences, vocab_size]` (or `[all tokens, vocab_size]`, or `[0, vocab_size]`) where the head is.

        Raises:
            GenerationError: the cache is full, a sequence would be too long, or the VRAM does not suffice; nothing was
                appended.
        """
        work = self.start_prefill(parts, wanted)
        try:
            while work.num_layers_left:
                work.advance(work.num_layers_left)
            return work.logits()
        except BaseException:
            work.abandon()
            raise

    def start_prefill(
        self, parts: Sequence[tuple[PagedSequence, torch.Tensor]], wanted: WantedLogits = "last"
    ) -> PartialPrefill:
        """As `prefill`, but nothing is computed yet."""
        self._check_lengths([sequence.length + len(ids) for sequence, ids in parts])
        chunk = PromptChunk([(sequence, sequence.length, ids) for sequence, ids in parts], wanted)
        chunk.append()
        work = PartialPrefill(self.decoder, chunk, self.chunk_limit, self._start_piece)
        try:
            work.begin()
        except BaseException:
            chunk.undo()
            raise
        return work

    def _start_piece(self, piece: Piece) -> PieceRun:
        """A piece of prompts in front of the first layer; VramError if there is no memory for it."""
        with told_if_out_of_vram(f"{piece.num_tokens} tokens of prompts at once"):
            slots = piece.recurrent_slots if self.chunk_limit.can_cut(piece.num_tokens) else []
            states = [cache for cache in self.caches if isinstance(cache, StateLayer)]
            saved = SavedStates(states, slots) if slots else None
            # First, since it makes room: what was allocated before would be in the middle of that.
            path, on_end = self._chunk_path(piece.num_tokens, piece.asks_some)
            try:
                step_input = piece.step_input().to(self.decoder.device)
                hidden = self.decoder.embed(piece.token_ids).to(self.decoder.device)
            except BaseException:
                if on_end is not None:
                    on_end()
                raise
        step = GpuStep(step_input, self.caches, self.decoder.angles, max(piece.counts), path)
        return PieceRun(self.decoder, step, path, piece, hidden, saved, on_end)

    def decode(
        self, sequences: Sequence[PagedSequence], token_ids: Sequence[int], to_host: bool = False
    ) -> torch.Tensor:
        """Append one token to each sequence.

        Args:
            sequences: each of them once.
            token_ids: one for each.
            to_host: bring logits to the CPU.

        Returns:
            float32 `[sequences, vocab_size]` where the head is, or on the CPU; the next call of the same batch size may
            overwrite it.

        Raises:
            GenerationError: the cache is full, or the VRAM does not suffice.
            ExpertTimeoutError: GPU and CPU waited for each other too long. In both cases nothing was appended, and
                further calls may work; but sequences with recurrent states, which may have changed, were emptied if
                the step had begun.
        """
        count = len(sequences)
        if not 1 <= count <= self.options.max_batch or len(token_ids) != count:
            raise KernelError(f"{count} sequences, {len(token_ids)} tokens: expected 1 to {self.options.max_batch}.")
        self._check_lengths([sequence.length + 1 for sequence in sequences])
        tail = self.decoder.tail
        with told_if_out_of_vram(f"a decode step of {count} sequences"):
            out = self.steps.run(sequences, token_ids, to_host or tail is not None)
        return out if tail is None else self._through_tail(tail, out, sequences)

    @staticmethod
    def _through_tail(tail: CpuTail, out: torch.Tensor, sequences: Sequence[PagedSequence]) -> torch.Tensor:
        """Logits behind the layers on the CPU; if these fail, sequences are as before the step."""
        try:
            rows = zip(out.split(1), sequences, strict=True)
            return tail.logits(torch.cat([tail(row, sequence) for row, sequence in rows]))
        except BaseException:
            for sequence in sequences:
                sequence.truncate(0 if sequence.is_recurrent else sequence.length - 1)
            raise

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `decode`, and the likeliest next token of each sequence, -1 if its logits are no numbers.

        The GPU has found it where it has the head.
        """
        logits = self.decode(sequences, token_ids)
        return self.steps.likeliest(len(sequences)) if self.decoder.tail is None else ops.likeliest(logits)

    def head_seconds(self, batch: int, repeat: int = 5) -> float:
        """Seconds that last norm and head take for `batch` tokens; 0 if they are on the CPU."""
        if self.decoder.tail is not None:
            return 0.0
        hidden = torch.zeros(batch, self.decoder.hidden_size, device=self.decoder.device)
        times = []
        for _ in range(repeat + 1):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.decoder.logits(hidden)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        most = self.options.max_positions
        if most is not None and lengths and max(lengths) > most:
            raise GenerationError(
                f"a sequence of {max(lengths)} tokens: there is room for {most} at most. Use a shorter prompt, or load "
                "the model with a larger --context."
            )

    def _chunk_path(self, num_tokens: int, some: bool) -> tuple[ChunkPath, Callable[[], None] | None]:
        """Who computes experts of a chunk, of whose tokens the last layer gets all or only some, and its end."""
        common = (self.hand_off.exchange, self.decoder.routed, self.slots, self._chunk_buffers)
        if self.staging is None or self.shares is None:
            return ChunkPath(*common), None
        streams = self.lending is not None and num_tokens > MAX_DECODE_TOKENS
        if self.lending is not None and streams:
            with told_if_no_lots(f"{num_tokens} tokens of prompts at once"):
                self.lending.begin_streaming(num_tokens)
        on_end = self.lending.end_streaming if self.lending is not None and streams else None
        try:
            finishes = some and self.decoder.tail is None
            last = self.decoder.layers[-1].feed_forward.layer if finishes else None
            return StreamingPath(*common, self.staging, self.shares, num_tokens, last), on_end
        except BaseException:
            if on_end is not None:
                on_end()
            raise

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        return PagedSequence(self.pool, self.states)

    def copy(self, sequence: PagedSequence) -> PagedSequence:
        """A sequence of its own with the same contents.

        Raises:
            GenerationError: the cache is full.
        """
        twin = self.new_sequence()
        twin.append(sequence.length)
        source, target = (torch.tensor(each.blocks, device=self.decoder.device) for each in (sequence, twin))
        for cache in self.caches if sequence.length else []:
            if isinstance(cache, StateLayer):
                cache.copy(sequence.state_slot, twin.state_slot)
            else:
                cache.copy(source, target)
        if self.decoder.tail is not None:
            self.decoder.tail.copy(sequence, twin)
        return twin
