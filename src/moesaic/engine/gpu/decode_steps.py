"""Decode steps: a bucket for each of some batch sizes, whose steps are captured once as a graph and replayed.

The thread that replays a graph answers its requests for routed experts, so that there is no thread besides the kernels'
pool. Without graphs the same is launched anew each time. It chooses neither tokens nor whose turn it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moesaic.engine.gpu.hand_off import HandOff
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.runner_options import RunnerOptions
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.step_buffers import StepBuffers
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.triton.argmax import argmax
from moesaic.kvcache.paged import PagedSequence, PoolLayer
from moesaic.kvcache.states import StateLayer
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import ExpertPath, GpuStep

__all__ = ["Bucket", "DecodeSteps"]


@dataclass(slots=True)
class Bucket:
    """The buffers of decode steps of up to so many sequences, and the graphs that read and write them."""

    buffers: StepBuffers
    out: torch.Tensor  # logits, or what the tail goes on with
    likeliest: torch.Tensor  # tokens, by the logits; like host in page-locked memory
    host: torch.Tensor | None = None  # a copy of out, once somebody has asked for one
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)  # without uploads, and with


class DecodeSteps:
    """Decode steps of a runner.

    Args:
        decoder: the model.
        caches: of every layer on the GPU.
        options: of the runner.
        max_blocks: most blocks of a sequence.
        hand_off: by which the CPU is asked for experts.
        slots: routed experts on the GPU.
        uploads: brings misses to the GPU; None: all are the CPU's.
        lending: memory that moves between steps, or None.

    Attributes:
        lending: as given.
        buckets: by the most sequences of their steps.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        caches: list[PoolLayer | StateLayer],
        options: RunnerOptions,
        max_blocks: int,
        hand_off: HandOff,
        slots: ExpertSlots,
        uploads: MissUploads | None = None,
        lending: VramLending | None = None,
    ) -> None:
        self._decoder, self._caches, self._options, self._max_blocks = decoder, caches, options, max_blocks
        self._hand_off, self._slots, self._uploads, self.lending = hand_off, slots, uploads, lending
        self.buckets: dict[int, Bucket] = {}
        self._token_ids = torch.zeros(options.max_batch, dtype=torch.int64)

    @property
    def slots(self) -> ExpertSlots:
        """As given. Graphs use what there was when they were captured: others make all `buckets` anew."""
        return self._slots

    @slots.setter
    def slots(self, slots: ExpertSlots) -> None:
        self._slots, self.buckets = slots, {}

    @property
    def uploads(self) -> MissUploads | None:
        """As given; others make all `buckets` anew."""
        return self._uploads

    @uploads.setter
    def uploads(self, uploads: MissUploads | None) -> None:
        self._uploads, self.buckets = uploads, {}

    def run(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int], to_host: bool = False) -> torch.Tensor:
        """Append one token to each of 1 to `max_batch` sequences.

        Args:
            sequences: each of them once.
            token_ids: one for each.
            to_host: bring the result to the CPU.

        Returns:
            float32 `[sequences, vocab_size]`, or `[sequences, hidden_size]` for the decoder's tail; the next call may
            overwrite it.

        Raises:
            GenerationError: the cache is full.
            ExpertTimeoutError: GPU and CPU waited for each other too long. In both cases nothing was appended, but
                sequences with recurrent states were emptied by the latter.
        """
        count = len(sequences)
        bucket = self.bucket(count)
        bucket.buffers.append(sequences)
        try:
            self._token_ids.numpy()[:count] = token_ids
            self._decoder.embed(self._token_ids[:count], bucket.buffers.rows(count))
            self._run(bucket, count, to_host)
        except BaseException:
            self._hand_off.recover()
            for sequence in sequences:
                sequence.truncate(0 if sequence.is_recurrent else sequence.length - 1)
            raise
        return (bucket.host if to_host and bucket.host is not None else bucket.out)[:count]

    def likeliest(self, count: int) -> list[int]:
        """The likeliest token of each of the last step's `count` sequences; without a tail."""
        tokens: list[int] = self.bucket(count).likeliest[:count].tolist()
        return tokens

    def bucket(self, count: int) -> Bucket:
        """The smallest one with room for `count` sequences; made if need be."""
        size = self._size(count)
        if size not in self.buckets:
            self.buckets[size] = self._make_bucket(size)
        return self.buckets[size]

    @property
    def sizes(self) -> list[int]:
        """Of steps, ascending: one of fewer sequences is padded."""
        return sorted({self._size(1 << power) for power in range(self._options.max_batch.bit_length() + 1)})

    def rehearse(self, size: int) -> None:
        """Launch what steps of `size` sequences do. Nobody answers the GPU, so launches must be noted, not done."""
        bucket = self._new_bucket(size)
        for brings in self._ways(size):
            self._compute(bucket, self._graph_path(brings), brings)

    def warm_up(self, bucket: Bucket, size: int, brings: bool) -> None:
        """Compile and load every kernel of a step, in which all is padding, whose experts do not count as used."""
        server = self._hand_off.server
        uses = None if server is None else server.uses.clone()
        self._compute(bucket, self._eager_path(size, brings), brings)
        if server is not None and uses is not None:
            server.uses.copy_(uses)

    def _run(self, bucket: Bucket, count: int, to_host: bool) -> None:
        hand_off, cache, uploads, began = self._hand_off, self.slots.cache, self._uploads_of(count), time.perf_counter()
        if cache is not None:
            cache.before_step()
        is_quiet = cache is None or not cache.is_busy
        brings = uploads is not None and uploads.before_step(count, is_quiet)
        if not bucket.graphs:
            self._compute(bucket, self._eager_path(count, brings), brings)
            if cache is not None:
                cache.during_step()
        else:
            bucket.graphs[brings].replay()
            if cache is not None:
                cache.during_step()
            hand_off.serve(count)
        if cache is not None and hand_off.server is not None:  # while the GPU computes what follows the last layer
            uses, way = hand_off.server.uses.numpy().view(np.uint32), 0 if uploads is None else uploads.share
            cache.after_step(hand_off.served, uses, count, way)
        if to_host:
            self._fetch(bucket, count)
        if bucket.out.is_cuda:
            torch.cuda.current_stream().synchronize()
        hand_off.check()
        if uploads is not None:
            uploads.after_step(time.perf_counter() - began, is_quiet)
        if self.lending is not None:
            self.lending.after_step()

    def _fetch(self, bucket: Bucket, count: int) -> None:
        """Begin to copy the result; pages of memory that was never used would take longer than the copy."""
        if bucket.host is None:
            bucket.host = torch.zeros(bucket.out.shape, pin_memory=bucket.out.is_cuda)
        bucket.host[:count].copy_(bucket.out[:count], non_blocking=True)

    def _uploads_of(self, num_tokens: int) -> MissUploads | None:
        """Who brings misses in steps of so many tokens."""
        return self.uploads if self.uploads is not None and self.uploads.takes(self._size(num_tokens)) else None

    def _compute(self, bucket: Bucket, path: ExpertPath, brings: bool) -> None:
        """What a graph holds."""
        decoder = self._decoder
        with torch.no_grad():
            bucket.buffers.upload()
            hidden = bucket.buffers.hidden
            normed = decoder.run(hidden, GpuStep(bucket.buffers.input, self._caches, decoder.angles, 1, path))
            if decoder.tail is not None:
                bucket.out.copy_(hidden)
            else:
                argmax(decoder.logits(hidden, normed, bucket.out), bucket.likeliest)
            self._hand_off.end_step()
            if brings and self.uploads is not None:
                self.uploads.report()

    def _eager_path(self, num_tokens: int, brings: bool) -> ExpertPath:
        return self._hand_off.eager_path(self.slots, self.uploads if brings else None, num_tokens)

    def _size(self, count: int) -> int:
        return min(1 << (count - 1).bit_length(), self._options.max_batch)

    def _graph_path(self, brings: bool) -> ExpertPath:
        return self._hand_off.graph_path(self.slots, self.uploads if brings else None)

    def _ways(self, size: int) -> tuple[bool, ...]:
        """How steps of a bucket run: without uploads, and with."""
        return (False, True)[: 1 if self._uploads_of(size) is None else 2]

    def _new_bucket(self, size: int) -> Bucket:
        decoder = self._decoder
        width = decoder.vocab_size if decoder.tail is None else decoder.hidden_size
        buffers = StepBuffers(size, self._max_blocks, decoder.hidden_size, decoder.device)
        likeliest = torch.zeros(size, dtype=torch.int64, pin_memory=decoder.device.type == "cuda")
        return Bucket(buffers, torch.zeros(size, width, device=decoder.device), likeliest)

    def _make_bucket(self, size: int) -> Bucket:
        bucket = self._new_bucket(size)
        if self._options.graphs and self._decoder.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()  # only one of the graphs runs at a time
            for brings in self._ways(size):
                self.warm_up(bucket, size, brings)
                torch.cuda.synchronize()
                path = self._graph_path(brings)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._compute(bucket, path, brings)
                bucket.graphs[brings] = graph
        return bucket
