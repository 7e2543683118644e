"""Runs steps of a decoder on a GPU: chunks of prompts eagerly, decode steps as one graph per batch size.

A decode step is captured once for each bucket of batch sizes. The thread that replays a graph answers its requests for
routed experts, so that there is no thread besides the kernels' pool. It knows sequences and tokens; it chooses neither
tokens nor whose turn it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moesaic.engine.gpu.layer_caches import layer_caches
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.partial_prefill import PartialPrefill
from moesaic.engine.gpu.paths import EagerPath, GraphPath
from moesaic.engine.gpu.prefill import ChunkBuffers, ChunkPath
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.step_buffers import StepBuffers
from moesaic.engine.gpu.streaming import StreamingPath
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.errors import ExpertTimeoutError, GenerationError, KernelError
from moesaic.kernels.handoff import ExpertServer, Mailbox
from moesaic.kernels.triton.experts import MAX_DECODE_TOKENS
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.states import StateLayer, StatePool, StateShape
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import ExpertPath, GpuStep
from moesaic.placement.vram import PREFILL_CHUNK

__all__ = ["ModelRunner", "RunnerOptions"]


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How a runner uses memory and time.

    Attributes:
        num_blocks: blocks of the cache.
        block_size: positions of a block.
        kv_dtype: what the cache stores.
        max_batch: most sequences of a decode step.
        graphs: whether decode steps are captured; only a GPU can.
        timeout: seconds that GPU and CPU wait for each other.
        num_states: sequences that can be there at once, if the model has recurrent states; `max_batch` if None.
        max_positions: of a sequence; what fits into all blocks if None.
        max_chunk: tokens of a prompt that go through the layers at once, at most.
    """

    num_blocks: int
    block_size: int = 64
    kv_dtype: torch.dtype = torch.bfloat16
    max_batch: int = 8
    graphs: bool = True
    timeout: float = 30.0
    num_states: int | None = None
    max_positions: int | None = None
    max_chunk: int = PREFILL_CHUNK


@dataclass(slots=True)
class _Bucket:
    """The buffers of decode steps of up to so many sequences, and the graphs that read and write them."""

    buffers: StepBuffers
    out: torch.Tensor  # logits, or what the tail goes on with
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)  # without uploads, and with


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
        lending: as given.
        served: layers, of those with routed experts, whose experts the CPU is asked for.
        times: see `ExpertServer.serve`; filled by decode steps if it is set.
        uploads: as given, or None; then no_uploads says why.
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
        self.decoder, self.options, self.slots = decoder, options, slots or ExpertSlots()
        self._staging, self.shares = staging, shares
        self.uploads = None if isinstance(uploads, str) else uploads
        self.no_uploads = uploads if isinstance(uploads, str) else ""
        self._chunk_buffers, self.lending = ChunkBuffers(decoder.device), lending
        device = decoder.device
        shapes = [layer.attention.cache_shape for layer in decoder.layers]
        num_states = options.num_states or options.max_batch
        is_recurrent = any(isinstance(shape, StateShape) for shape in shapes)
        self.states = StatePool(num_states) if is_recurrent else None
        self.pool, self.caches = layer_caches(
            shapes, options.num_blocks, options.block_size, options.kv_dtype, num_states, device, lending
        )
        self.positions, served = _request_positions(
            [self.slots.is_complete(layer) for layer in range(len(decoder.routed))]
        )
        self.served = served
        mailbox = None
        self.server: ExpertServer | None = None
        if served:
            mailbox = Mailbox.of(options.max_batch, decoder.hidden_size, decoder.top_k, pinned=device.type == "cuda")
            experts = [experts for experts in decoder.routed if experts is not None]
            assert len(experts) == len(served)
            self.server = ExpertServer(mailbox, experts, count_uses=True)
        self.exchange = Exchange(mailbox, device)
        self.exchange.set_timeout(options.timeout)
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._buckets: dict[int, _Bucket] = {}
        self.times: torch.Tensor | None = None

    @property
    def max_positions(self) -> int:
        """Positions that a sequence may have."""
        of_all = self.pool.num_blocks * self.options.block_size
        return of_all if self.options.max_positions is None else min(self.options.max_positions, of_all)

    def prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]], all_logits: bool = False) -> torch.Tensor:
        """Append tokens to sequences.

        Args:
            parts: sequences, each with its new token ids, int64 `[tokens]` on the CPU.
            all_logits: of all tokens instead of the last of each sequence.

        Returns:
            float32 `[sequences, vocab_size]` (or `[all tokens, vocab_size]`) where the head is.

        Raises:
            GenerationError: the cache is full, or a sequence would be too long; nothing was appended.
        """
        work = self.start_prefill(parts)
        try:
            work.advance(work.num_layers_left)
            return work.logits(all_logits)
        except BaseException:
            work.abandon()
            raise

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> PartialPrefill:
        """As `prefill`, but nothing is computed yet."""
        before = [sequence.length for sequence, _ in parts]
        self._check_lengths([length + len(ids) for length, (_, ids) in zip(before, parts, strict=True)])
        step_input = StepInput.build([(sequence, len(ids)) for sequence, ids in parts]).to(self.decoder.device)
        token_ids = torch.cat([ids for _, ids in parts])
        try:
            hidden = self.decoder.embed(token_ids).to(self.decoder.device)
            path, on_end = self._chunk_path(len(token_ids))
        except BaseException:
            for (sequence, _), length in zip(parts, before, strict=True):
                sequence.undo(length)
            raise
        longest = max(len(ids) for _, ids in parts)
        cut = [(sequence, length, len(ids)) for (sequence, ids), length in zip(parts, before, strict=True)]
        return PartialPrefill(self.decoder, self._step(step_input, longest, path), path, cut, hidden, on_end)

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """Append one token to each sequence.

        Returns:
            float32 `[sequences, vocab_size]` where the head is; the next call of the same batch size may overwrite it.

        Raises:
            GenerationError: the cache is full.
            ExpertTimeoutError: GPU and CPU waited for each other too long. In both cases nothing was appended, and
                further calls may work; but sequences with recurrent states, which may have changed, were emptied by
                the latter.
        """
        count = len(sequences)
        if not 1 <= count <= self.options.max_batch or len(token_ids) != count:
            raise KernelError(f"{count} sequences, {len(token_ids)} tokens: expected 1 to {self.options.max_batch}.")
        self._check_lengths([sequence.length + 1 for sequence in sequences])
        bucket = self._bucket(count)
        bucket.buffers.append(sequences)
        try:
            bucket.buffers.set_hidden(self.decoder.embed(torch.as_tensor(token_ids, dtype=torch.int64)))
            bucket.buffers.upload()
            self._run(bucket, count)
        except BaseException:
            self._recover()
            for sequence in sequences:
                sequence.truncate(0 if sequence.is_recurrent else sequence.length - 1)
            raise
        tail = self.decoder.tail
        if tail is not None:
            rows = bucket.out[:count].cpu().split(1)
            return tail.logits(torch.cat([tail(row, sequence) for row, sequence in zip(rows, sequences, strict=True)]))
        return bucket.out[:count]

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

    def _chunk_path(self, num_tokens: int) -> tuple[ChunkPath, Callable[[], None] | None]:
        """Who computes experts of a chunk, and what to call when it is through."""
        common = (self.exchange, self.decoder.routed, self.slots, self._chunk_buffers)
        if self._staging is None or self.shares is None:
            return ChunkPath(*common), None
        streams = self.lending is not None and num_tokens > MAX_DECODE_TOKENS
        if self.lending is not None and streams:
            self.lending.begin_streaming(num_tokens)
        on_end = self.lending.end_streaming if self.lending is not None and streams else None
        try:
            return StreamingPath(*common, self._staging, self.shares, num_tokens), on_end
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

    def _run(self, bucket: _Bucket, count: int) -> None:
        cache, uploads, began = self.slots.cache, self._uploads_of(count), time.perf_counter()
        if cache is not None:
            cache.before_step()
        is_quiet = cache is None or not cache.is_busy
        brings = uploads is not None and uploads.before_step(count, is_quiet)
        if not bucket.graphs:
            self._decode_step(bucket, self._eager_path(count, brings), brings)
            if cache is not None:
                cache.during_step()
        else:
            bucket.graphs[brings].replay()
            if cache is not None:
                cache.during_step()
            if self.server is not None:
                self.server.serve(count, timeout=self.options.timeout, times=self.times)
        if cache is not None and self.server is not None:  # while the GPU computes what follows the last layer
            uses, way = self.server.uses.numpy().view(np.uint32), 0 if uploads is None else uploads.share
            cache.after_step(self.served, uses, count, way)
        if bucket.out.is_cuda:
            torch.cuda.current_stream().synchronize()
        if int(self._failed):
            raise ExpertTimeoutError(
                f"the CPU did not answer the GPU within {self.options.timeout:g} s: the computer is overloaded or the "
                "process was stopped. The request failed; the next one may be tried."
            )
        if uploads is not None:
            uploads.after_step(time.perf_counter() - began, is_quiet)
        if self.lending is not None:
            self.lending.after_step()

    def _uploads_of(self, num_tokens: int) -> MissUploads | None:
        """Who brings misses in steps of so many tokens."""
        return self.uploads if self.uploads is not None and self.uploads.takes(self._size(num_tokens)) else None

    def _decode_step(self, bucket: _Bucket, path: ExpertPath, brings: bool) -> None:
        """What a graph holds."""
        with torch.no_grad():
            hidden = bucket.buffers.hidden.clone()  # a graph is replayed on the same input
            self.decoder.run(hidden, self._step(bucket.buffers.input, 1, path))
            bucket.out.copy_(hidden if self.decoder.tail is not None else self.decoder.logits(hidden))
            self.exchange.advance(0 if self.server is None else len(self.server.layers))
            self._failed.copy_(self.exchange.failed, non_blocking=True)
            if brings and self.uploads is not None:
                self.uploads.report()

    def _step(self, step_input: StepInput, max_query_len: int, path: ExpertPath) -> GpuStep:
        return GpuStep(step_input, self.caches, self.decoder.angles, max_query_len, path)

    def _eager_path(self, num_tokens: int, brings: bool) -> ExpertPath:
        if self.server is None:
            return GraphPath(self.exchange, self.slots, self.positions)
        uploads, timeout = self.uploads if brings else None, self.options.timeout
        return EagerPath(self.exchange, self.slots, self.positions, self.server, num_tokens, timeout, uploads)

    def _bucket(self, count: int) -> _Bucket:
        """The smallest bucket with room for `count` sequences."""
        size = self._size(count)
        if size not in self._buckets:
            self._buckets[size] = self._make_bucket(size)
        return self._buckets[size]

    def _size(self, count: int) -> int:
        return min(1 << (count - 1).bit_length(), self.options.max_batch)

    def _make_bucket(self, size: int) -> _Bucket:
        device, decoder = self.decoder.device, self.decoder
        width = decoder.vocab_size if decoder.tail is None else decoder.hidden_size
        bucket = _Bucket(
            StepBuffers(size, self.pool.blocks_for(self.max_positions), decoder.hidden_size, device),
            torch.zeros(size, width, device=device),
        )
        if self.options.graphs and device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()  # only one of the graphs runs at a time
            for brings in (False, True)[: 1 if self._uploads_of(size) is None else 2]:
                self._warm_up(bucket, size, brings)
                torch.cuda.synchronize()
                path = GraphPath(self.exchange, self.slots, self.positions, self.uploads if brings else None)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._decode_step(bucket, path, brings)
                bucket.graphs[brings] = graph
        return bucket

    def _warm_up(self, bucket: _Bucket, size: int, brings: bool) -> None:
        """Compile and load every kernel of a step, in which all is padding, whose experts do not count as used."""
        uses = None if self.server is None else self.server.uses.clone()
        self._decode_step(bucket, self._eager_path(size, brings), brings)
        if self.server is not None and uses is not None:
            self.server.uses.copy_(uses)

    def _recover(self) -> None:
        """Let the GPU drain and begin to count requests anew."""
        if self.server is None:
            return
        self.server.give_up()
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()
        self.server.restart()
        self.exchange.restart()
        self._failed.zero_()


def _request_positions(on_gpu: list[bool]) -> tuple[list[int | None], list[int]]:
    """Of each layer with routed experts its request's position in a step, and the layers that are asked for."""
    positions: list[int | None] = []
    served: list[int] = []
    for layer, complete in enumerate(on_gpu):
        positions.append(None if complete else len(served))
        if not complete:
            served.append(layer)
    return positions, served
